"""Recipes become settings or one sentence that names the file and the key; dumping loses nothing."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pomona.data.formats import FORMATS, Auto, Mapped
from pomona.data.templates import TEMPLATES, Chat
from pomona.errors import PomonaError
from pomona.federation.clients import ClientData
from pomona.federation.graft import Graft
from pomona.federation.partition import PARTITIONS, Dirichlet
from pomona.federation.selection import SELECTIONS, RandomExpert
from pomona.federation.settings import FederateSettings
from pomona.federation.strategies import STRATEGIES, FedAvg, FedProx
from pomona.pipelines.reconstruct import ReconstructSettings
from pomona.recipe import build, dump, read_recipe
from pomona.recipe.reconstruct import ReconstructRecipe, read_reconstruct_recipe
from pomona.recipe.registries import REGISTRIES, lacking
from pomona.reconstruction.compensate import COMPENSATIONS
from pomona.reconstruction.router import ROUTERS
from pomona.reconstruction.scores import SCORES
from pomona.reconstruction.specialise import Specialise

GOOD = 'model = "org/name"\n'
DATA = '[data]\ntrain = "train.jsonl"\ntest = "test.jsonl"\n'


@dataclass(frozen=True)
class OutsideStrategy:
    """What another package could bring."""

    strength: float = 1.0
    shares = "adapter"
    init = FedAvg.init
    aggregate = FedAvg.aggregate


@dataclass(frozen=True)
class Half:
    """A server that has no state to begin with."""

    shares = "adapter"
    aggregate = FedAvg.aggregate


@dataclass(frozen=True)
class Hoarder:
    """Whoever does not say what is shared."""

    init = FedAvg.init
    aggregate = FedAvg.aggregate


@dataclass(frozen=True)
class Narrow:
    """An aggregation that takes no updates."""

    shares = "adapter"
    init = FedAvg.init

    def aggregate(self, state):
        """Return the state."""
        return state


@dataclass(frozen=True)
class Nothing:
    """A dataclass and no more."""


def no_dataclass() -> None:
    """Importable, but no kind."""


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> str:
    """Make this file's members importable under a module name."""
    import sys
    import types

    module = types.ModuleType("pomona_outside")
    for each in (OutsideStrategy, Half, Hoarder, Narrow, Nothing):
        setattr(module, each.__name__, each)
    module.no_dataclass = no_dataclass
    monkeypatch.setitem(sys.modules, "pomona_outside", module)
    monkeypatch.setattr(OutsideStrategy, "__module__", "pomona_outside")
    return "pomona_outside"


def read(folder: Path, text: str) -> FederateSettings:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path, FederateSettings)


def complaint(folder: Path, text: str) -> str:
    """Return the error's sentence, which is one line and names the file."""
    with pytest.raises(PomonaError) as caught:
        read(folder, text)
    message = str(caught.value)
    assert str(folder / "recipe.toml") in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "named", "listed"),
    [
        (GOOD + "round = 3\n" + DATA, '"round"', ["rounds", "fraction", "strategy"]),
        (GOOD + DATA + "[local]\nstep = 3\n", 'local: unknown key "step"', ["steps", "batch"]),
        (
            GOOD + DATA + "[local.optimiser]\nbeta = 3\n",
            'local: optimiser: unknown key "beta"',
            ["weight_decay"],
        ),
        (
            GOOD + DATA + '[strategy]\nkind = "fedprox"\nnu = 1.0\n',
            'strategy: unknown key "nu"',
            ["valid keys are mu"],
        ),
        (
            GOOD + DATA + '[data.partition]\nkind = "dirichlet"\nbeta = 1.0\n',
            'data: partition: unknown key "beta"',
            ["alpha", "clients"],
        ),
        (
            GOOD + DATA + '[graft.selection]\nkind = "random"\nrows = 1\n',
            'graft: selection: unknown key "rows"',
            ["it takes none"],
        ),
        (
            GOOD + DATA + '[graft.selection]\nkind = "same"\nrows = 1\n',
            'graft: selection: unknown key "rows"',
            ["valid keys are draw, expert"],
        ),
    ],
)
def test_an_unknown_key_is_named_and_the_valid_ones_listed(tmp_path, text, named, listed):
    message = complaint(tmp_path, text)
    assert named in message
    assert [key for key in listed if key not in message] == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('rounds = "three"\n', ["rounds", "'three'", "valid integer"]),
        ("rounds = 2.5\n", ["rounds", "2.5", "integer"]),
        ("rounds = true\n", ["rounds", "True", "integer"]),
        ("fraction = nan\n", ["fraction", "nan", "finite"]),
        ("name = 3\n", ["name", "3", "valid string"]),
        ("name = 2020-01-01T10:00:00\n", ["name", "datetime"]),
        ('dtype = "float8"\n', ["dtype", "'float8'", "'bfloat16'"]),
        ("template = 3\n", ["template", "kind", "alpaca, chat"]),
        ('local = "fast"\n', ["local", "'fast'", "table"]),
        ('adapter = {targets = "q_proj"}\n', ["adapter: targets", "'q_proj'", "array"]),
        ("adapter = {targets = [1]}\n", ["adapter: targets", "[1]", "string"]),
        ("evaluation = {forgetting = 3}\n", ["evaluation: forgetting", "3"]),
        ("evaluation = {windows = -1}\n", ["evaluation: evaluation windows -1 is negative"]),
        ("evaluation = {speed = 1}\n", ["evaluation: speed is 1", "boolean"]),
        ("rounds = 0\n", ["rounds 0", "1 or more"]),
        ('strategy = {kind = "fedprox", mu = -1.0}\n', ["strategy: FedProx mu -1.0"]),
        *(
            (
                f"local = {{optimiser = {{{name} = {value}}}}}\n",
                [f"local: optimiser: {name} {value} is not between 0 and 1"],
            )
            for name in ("beta1", "beta2")
            for value in (1.0, 1.5, -0.1)
        ),
        ("local = {optimiser = {beta1 = nan}}\n", ["local: optimiser: beta1", "nan", "finite"]),
        ("local = {optimiser = {clip = -1.0}}\n", ["local: optimiser: clip -1.0 is negative"]),
        ("graft = {count = 0}\n", ["graft: graft count 0", "1 or more"]),
        ("graft = {count = 1.5}\n", ["graft: count is 1.5", "integer"]),
        ('graft = {weights = "half"}\n', ["graft: weights is 'half'", "'lora'", "'full'"]),
        ('graft = {gate = "ajar"}\n', ["graft: gate is 'ajar'", "'none'", "'resident'"]),
        ('graft = {gate = "none", bias = true}\n', ["graft: graft bias", "leave bias out"]),
        ('graft = {selection = {kind = "greedy", rows = 0}}\n', ["selection rows 0", "128"]),
        ('graft = {selection = {kind = "same", expert = -1}}\n', ["selection expert -1", "from 0"]),
        ("adapter = {alpha = inf}\n", ["adapter: alpha", "inf", "finite"]),
        ('template = {kind = "chat", system = 3}\n', ["template: system is 3", "string"]),
        ('template = {kind = "alpaca", system = "x"}\n', ['template: unknown key "system"']),
    ],
)
def test_a_wrong_type_or_value_is_named_with_what_would_be_right(tmp_path, text, parts):
    message = complaint(tmp_path, GOOD + text + DATA)
    assert [part for part in parts if part not in message] == []


def test_a_path_that_is_no_text_is_refused(tmp_path):
    assert "data: train is 3" in complaint(tmp_path, GOOD + "[data]\ntrain = 3\ntest = 'x'\n")


def test_a_missing_key_is_named(tmp_path):
    assert 'the key "model" is missing' in complaint(tmp_path, DATA)


def test_rows_may_be_left_to_sites(tmp_path):
    assert read(tmp_path, GOOD).data is None


@pytest.mark.parametrize(
    ("text", "field", "registry"),
    [
        ('strategy = "fedsgd"\n' + DATA, "strategy", STRATEGIES),
        ('template = "none"\n' + DATA, "template", TEMPLATES),
        (DATA + '[data.partition]\nkind = "by"\n', "data: partition", PARTITIONS),
        (DATA + 'format = "csv"\n', "data: format", FORMATS),
        (DATA + '[graft]\nselection = "best"\n', "graft: selection", SELECTIONS),
    ],
)
def test_an_unknown_kind_is_named_and_the_known_ones_listed(tmp_path, text, field, registry):
    message = complaint(tmp_path, GOOD + text)
    assert f"{field}: unknown kind" in message
    assert ", ".join(sorted(registry)) in message


def test_a_kind_without_settings_may_be_written_as_text(tmp_path):
    short = read(tmp_path, GOOD + 'strategy = "fedprox"\n' + DATA)
    long = read(tmp_path, GOOD + DATA + '[strategy]\nkind = "fedprox"\n')
    assert short == long
    assert short.strategy == FedProx()


def test_the_system_turn_of_the_chat_template_is_a_recipe_s_to_set(tmp_path):
    for text in (
        'template = {kind = "chat", system = "Be brief."}\n' + DATA,
        DATA + '[template]\nkind = "chat"\nsystem = "Be brief."\n',
    ):
        settings = read(tmp_path, GOOD + text)
        assert settings.template == Chat("Be brief.")
        assert read(tmp_path, dump(settings)) == settings


def test_a_recipe_says_which_field_is_which(tmp_path):
    mapped = (
        '[data.format]\nkind = "mapped"\ninstruction = "q"\nresponse = "a"\ncategory = "topic"\n'
    )
    settings = read(tmp_path, GOOD + DATA + mapped)
    assert settings.data.format == Mapped("q", "", "a", "topic")
    assert read(tmp_path, dump(settings)) == settings
    assert read(tmp_path, GOOD + DATA).data.format == Auto()
    for wrong, says in (
        (
            'answer = "a"\n',
            'data: format: unknown key "answer"; valid keys are category, context, ',
        ),
        ("context = 3\n", "data: format: context is 3"),
    ):
        assert says in complaint(tmp_path, GOOD + DATA + mapped + wrong)
    empty = mapped.replace('"q"', '""')
    assert "data: format: the mapped instruction is empty" in complaint(
        tmp_path, GOOD + DATA + empty
    )


def test_rows_come_from_a_file_by_its_suffix_and_else_from_the_hub(tmp_path):
    text = GOOD + '[data]\ntrain = "{}"\ntest = "rows/x.csv"\n'
    for name in ("org/name", "org/name:main:train[:90%]", "name-v1.5"):
        settings = read(tmp_path, text.format(name))
        assert settings.data.train == name
        assert settings.data.test == tmp_path / "rows/x.csv"
        assert read(tmp_path, dump(settings)) == settings
    for name in ("x.jsonl", "x.json", "x.csv", "rows/x.parquet", "./rows"):
        assert read(tmp_path, text.format(name)).data.train == tmp_path / name
    (tmp_path / "org").mkdir()
    (tmp_path / "org/name").write_text("")
    assert read(tmp_path, text.format("org/name")).data.train == tmp_path / "org/name"


def test_an_outside_member_is_imported_with_its_settings(tmp_path, outside):
    text = GOOD + DATA + f'[strategy]\nkind = "{outside}:OutsideStrategy"\nstrength = 2.0\n'
    settings = read(tmp_path, text)
    assert settings.strategy == OutsideStrategy(2.0)
    assert read(tmp_path, dump(settings)) == settings
    assert 'strategy: unknown key "strong"' in complaint(tmp_path, text + "strong = 1\n")


@pytest.mark.parametrize(
    "kind",
    [
        "no_such_package:Name",
        "pomona_outside:Nothing",
        ":Name",
        ".relative:Name",
        "pomona_outside:",
        "pomona_outside:no_dataclass",
    ],
)
def test_an_outside_member_that_is_none_is_named(tmp_path, outside, kind):
    message = complaint(tmp_path, GOOD + f'strategy = "{kind}"\n' + DATA)
    assert "strategy" in message
    assert f'"{kind}"' in message


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Half", "is no strategy: it has no method init(shared)"),
        ("Hoarder", "is no strategy: it has no shares"),
        ("Narrow", "is no strategy: its aggregate does not take (state, updates)"),
    ],
)
def test_an_outside_strategy_that_lacks_something_is_refused(tmp_path, outside, name, says):
    message = complaint(tmp_path, GOOD + f'strategy = "{outside}:{name}"\n' + DATA)
    assert f'strategy: "{outside}:{name}" {says}' in message


def test_every_protocol_is_checked(tmp_path, outside):
    """A dataclass without anything is refused wherever a kind can be named, and a member never is."""
    for protocol, registry in REGISTRIES.items():
        assert lacking(protocol, Nothing()) is not None, protocol
        for cls in registry.values():
            assert lacking(protocol, cls()) is None, cls
    for table, key in (
        (f'template = "{outside}:Nothing"\n' + DATA, "template"),
        (DATA + f'partition = "{outside}:Nothing"\n', "data: partition"),
        (DATA + f'[graft]\nselection = "{outside}:Nothing"\n', "graft: selection"),
    ):
        assert f'{key}: "{outside}:Nothing" is no ' in complaint(tmp_path, GOOD + table)


def test_an_unset_variable_is_refused_and_a_set_one_filled_in(tmp_path, monkeypatch):
    text = GOOD + '[data]\nfolder = "$POMONA_TEST_PLACE/clients"\n'
    monkeypatch.delenv("POMONA_TEST_PLACE", raising=False)
    message = complaint(tmp_path, text)
    assert "data: folder" in message
    assert "$POMONA_TEST_PLACE" in message
    monkeypatch.setenv("POMONA_TEST_PLACE", "/somewhere")
    assert read(tmp_path, text).data.folder == Path("/somewhere/clients")


def test_an_unknown_home_is_refused(tmp_path):
    text = GOOD + '[data]\nfolder = "~no-such-user-here/clients"\n'
    assert "data: folder" in complaint(tmp_path, text)


def test_paths_are_relative_to_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    settings = read(
        tmp_path / "recipes",
        'model = "../model"\n[data]\ntrain = "rows/train.jsonl"\ntest = "/rows/test.jsonl"\n',
    )
    assert Path(settings.model).samefile(tmp_path / "model")
    assert settings.data.train == tmp_path / "recipes/rows/train.jsonl"
    assert settings.data.test == Path("/rows/test.jsonl")
    assert read(tmp_path / "recipes", GOOD + DATA).model == "org/name"


def test_every_kind_of_a_federation_survives_dump_and_build(tmp_path):
    plain = FederateSettings(
        model="org/name",
        data=ClientData(train=tmp_path / "train.jsonl", test=tmp_path / "test.jsonl"),
    )
    made = [
        *(replace(plain, strategy=cls()) for cls in STRATEGIES.values()),
        *(replace(plain, data=replace(plain.data, partition=cls())) for cls in PARTITIONS.values()),
        *(replace(plain, data=replace(plain.data, format=cls())) for cls in FORMATS.values()),
        *(replace(plain, graft=Graft(selection=cls())) for cls in SELECTIONS.values()),
        *(replace(plain, template=cls()) for cls in TEMPLATES.values()),
    ]
    assert (
        len(made) == sum(map(len, (STRATEGIES, PARTITIONS, SELECTIONS, TEMPLATES, FORMATS))) >= 30
    )
    for settings in made:
        assert read(tmp_path, dump(settings)) == settings
    assert read(tmp_path, dump(replace(plain, graft=None))).graft is None


def test_fields_that_differ_from_the_defaults_survive_dump_and_build(tmp_path):
    settings = FederateSettings(
        model="org/name",
        data=ClientData(folder=tmp_path / "clients", partition=Dirichlet(3, 0.1)),
        seed=7,
        fraction=0.25,
        dtype="bfloat16",
        graft=Graft(RandomExpert(), 3, "copy", gate="zero", bias=True, weights="full", rank=3),
        strategy=FedProx(0.5),
    )
    assert read(tmp_path, dump(settings)) == settings


def test_every_kind_of_a_reconstruction_survives_dump_and_build(tmp_path):
    plain = ReconstructRecipe("org/name", tmp_path / "domains")
    made = [
        *(ReconstructSettings(score=cls()) for cls in SCORES.values()),
        *(
            ReconstructSettings(compensation=cls(), specialise=Specialise(rounds=0))
            for cls in COMPENSATIONS.values()
        ),
        *(
            ReconstructSettings(router=cls(), specialise=Specialise(rounds=0))
            for cls in ROUTERS.values()
        ),
    ]
    assert len(made) == len(SCORES) + len(COMPENSATIONS) + len(ROUTERS) >= 6
    path = tmp_path / "recipe.toml"
    for settings in made:
        whole = replace(plain, settings=settings)
        path.write_text(dump(whole), encoding="utf-8")
        assert read_recipe(path, ReconstructRecipe) == whole


def test_every_registry_member_can_be_built_by_name_alone(tmp_path):
    names = [(p, name) for p, registry in REGISTRIES.items() for name in registry]
    assert len(REGISTRIES) == 9
    for protocol, name in names:
        built = build(REGISTRIES[protocol][name], {}, tmp_path, "here")
        assert built == REGISTRIES[protocol][name]()


def test_overrides_replace_top_level_keys_and_none_does_not(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(GOOD + "seed = 3\n" + DATA, encoding="utf-8")
    settings = read_recipe(path, FederateSettings, {"model": "other/name", "seed": None})
    assert (settings.model, settings.seed) == ("other/name", 3)


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    assert read(tmp_path, "\ufeff" + GOOD + DATA).model == "org/name"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"model = \n", "valid TOML"),
        (b"model = 1\nmodel = 2\n", "valid TOML"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, content, says):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(PomonaError, match=says) as caught:
        read_recipe(path, FederateSettings)
    assert str(path) in str(caught.value)


def test_a_missing_recipe_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(PomonaError, match="cannot read the recipe") as caught:
            read_recipe(path, FederateSettings)
        assert str(path) in str(caught.value)


def test_options_win_over_a_reconstruct_recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        'model = "org/name"\ndomains = "text"\n[settings]\nexperts = 4\nkeep = 0.5\n',
        encoding="utf-8",
    )
    recipe = read_reconstruct_recipe(path, {"experts": 3, "keep": None, "model": None})
    assert (recipe.settings.experts, recipe.settings.keep) == (3, 0.5)
    assert recipe.domains == tmp_path / "text"


def test_reconstruct_settings_that_are_no_table_are_refused(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('model = "org/name"\ndomains = "text"\nsettings = 3\n', encoding="utf-8")
    with pytest.raises(PomonaError, match="settings is 3; it should be a table"):
        read_reconstruct_recipe(path, {})


@pytest.mark.parametrize(
    ("given", "missing"), [({}, "model is missing"), ({"model": "a/b"}, "domains is missing")]
)
def test_what_reconstruct_needs_is_asked_for(given, missing):
    with pytest.raises(PomonaError, match=missing):
        read_reconstruct_recipe(None, given)


def test_the_text_of_forgetting_is_found_from_the_recipe(tmp_path):
    (tmp_path / "r.toml").write_text(
        GOOD + DATA + '[evaluation]\nforgetting = "text"\nwindows = 3\n'
    )
    settings = read_recipe(tmp_path / "r.toml", FederateSettings)
    assert settings.evaluation.forgetting == tmp_path / "text"
    (tmp_path / "again.toml").write_text(dump(settings))
    assert read_recipe(tmp_path / "again.toml", FederateSettings) == settings
