"""What `pomona federate` says about the rows before it trains."""

import json

import pytest

from pomona.cli.app import main


def test_test_rows_that_are_trained_on_are_one_line_before_training(
    moe_dir, rows_dir, tmp_path, monkeypatch, capsys
):
    for name in ("pears", "plums"):
        for split in ("train", "test"):
            lines = (rows_dir / f"{split}.jsonl").read_text().splitlines()
            own = [x for x in lines if json.loads(x)["category"] == name][:3]
            (tmp_path / f"{name}.{split}.jsonl").write_text("\n".join(own))
    known = (tmp_path / "plums.train.jsonl").read_text().splitlines()[1]
    with (tmp_path / "pears.test.jsonl").open("a") as file:
        file.write(f"\n{known}\n")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'model = "{moe_dir}"\nrounds = 1\nmax_length = 96\n[data]\nfolder = "."\n'
        "[local]\nsteps = 1\nbatch = 1\n[evaluation]\nrows = 1\nanswers = 1\nnew_tokens = 2\n"
    )
    monkeypatch.setattr(
        "sys.argv", ["pomona", "federate", str(recipe), "--out", str(tmp_path / "r")]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    lines = capsys.readouterr().out.splitlines()
    says = [line for line in lines if line.startswith("duplicates")]
    assert says == [
        "duplicates: 1 of 7 test rows are train rows too (pears 1); by the prompt alone 0 more; for "
        "example pears.test.jsonl:4 is plums.train.jsonl:2 of plums"
    ]
    assert lines.index(says[0]) < next(i for i, line in enumerate(lines) if "rounds" in line)
