"""A certificate authority for a federation, its coordinator's certificate, and a key for every site."""

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from pomona.errors import PomonaError
from pomona.files import atomic_file, cannot_read, damaged
from pomona.flower.link import Certificate

AUTHORITY, COORDINATOR, SITES = "authority", "coordinator", "sites"
_DAYS = 825


@dataclass(frozen=True)
class CoordinatorKeys:
    """What a coordinator needs: its certificate, and the public keys of the sites that may join."""

    certificate: Certificate
    sites: dict[str, bytes]


@dataclass(frozen=True)
class SiteKeys:
    """What a site needs: its name and private key, and the certificate of the authority."""

    name: str
    key: ec.EllipticCurvePrivateKey
    authority: Path


def make_keys(folder: Path, hosts: Sequence[str], sites: Sequence[str]) -> list[str]:
    """Make what is missing in `folder`, and return what was made, name by name.

    `authority/` stays with who makes keys, `coordinator/` goes to the coordinator, every `sites/NAME/` to that
    site. Existing keys stay as they are; a coordinator's certificate is made anew when hosts are given.
    """
    made: list[str] = []
    authority_key = folder / AUTHORITY / "ca.key"
    if not authority_key.is_file():
        _make_authority(folder / AUTHORITY)
        made.append(AUTHORITY)
    coordinator = folder / COORDINATOR
    if hosts or not (coordinator / "coordinator.key").is_file():
        _make_certificate(folder, hosts or ["localhost", "127.0.0.1"])
        made.append(COORDINATOR)
    for name in sites:
        own = folder / SITES / name
        if (own / f"{name}.key").is_file():
            continue
        key = ec.generate_private_key(ec.SECP384R1())
        _write_secret(own / f"{name}.key", _private(key))
        _write(own / "ca.crt", (folder / AUTHORITY / "ca.crt").read_bytes())
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        _write(coordinator / SITES / f"{name}.pub", public)
        made.append(name)
    return made


def coordinator_keys(folder: Path) -> CoordinatorKeys:
    """Read a coordinator's folder; raises `PomonaError` naming what is missing or damaged."""
    chain, key = folder / "coordinator.crt", folder / "coordinator.key"
    for path in (chain, key):
        _present(path, "make it with pomona keys, and give its folder coordinator/")
    public: dict[str, bytes] = {}
    for path in sorted((folder / SITES).glob("*.pub")):
        try:
            loaded = load_pem_public_key(path.read_bytes())
        except ValueError as error:
            raise damaged(path, error) from error
        if not isinstance(loaded, ec.EllipticCurvePublicKey):
            raise damaged(path, "it is no elliptic-curve key")
        public[path.stem] = public_key_to_bytes(loaded)
    if not public:
        raise PomonaError(f"{folder / SITES} holds no NAME.pub; make sites' keys with pomona keys")
    return CoordinatorKeys(Certificate(chain, key), public)


def site_keys(folder: Path) -> SiteKeys:
    """Read a site's folder; raises `PomonaError` naming what is missing or damaged."""
    found = sorted(folder.glob("*.key"))
    if len(found) != 1:
        raise PomonaError(
            f"{folder} holds {len(found)} files NAME.key; it should hold the one of this site"
        )
    authority = folder / "ca.crt"
    _present(authority, "copy it from the folder that pomona keys has made")
    return SiteKeys(found[0].stem, _load(found[0]), authority)


def own_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key that a site without TLS keeps in its state, so that it stays the same node."""
    if not path.is_file():
        _write_secret(path, _private(ec.generate_private_key(ec.SECP384R1())))
    return _load(path)


def _make_authority(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Pomona federation")])
    certificate = (
        _unsigned(name, name, key.public_key(), 10 * 365)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    _write_secret(folder / "ca.key", _private(key))
    _write(folder / "ca.crt", certificate.public_bytes(Encoding.PEM))


def _make_certificate(folder: Path, hosts: Sequence[str]) -> None:
    authority = x509.load_pem_x509_certificate((folder / AUTHORITY / "ca.crt").read_bytes())
    signing = _load(folder / AUTHORITY / "ca.key")
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    certificate = (
        _unsigned(name, authority.subject, key.public_key(), _DAYS)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False
        )
        .sign(signing, hashes.SHA384())
    )
    _write_secret(folder / COORDINATOR / "coordinator.key", _private(key))
    _write(folder / COORDINATOR / "coordinator.crt", certificate.public_bytes(Encoding.PEM))


def _unsigned(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    began = datetime.now(UTC) - timedelta(hours=1)  # clocks differ a little
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(began)
        .not_valid_after(began + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _load(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, TypeError) as error:
        raise damaged(path, error) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise damaged(path, "it is no elliptic-curve key")
    return key


def _present(path: Path, remedy: str) -> None:
    if not path.is_file():
        raise PomonaError(f"{path} is missing; {remedy}")


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path) as partial:
        partial.write_bytes(content)


def _write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, from its first byte on."""
    with atomic_file(path) as partial:
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
