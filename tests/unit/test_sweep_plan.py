"""A sweep's YAML: what it expands to, and one sentence for each mistake, before anything starts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import sweep
import sweep_file
import sweep_plan
from data import DataError

from tests.unit.sweep_fakes import write_fake


def runs_of(folder: Path, arguments: dict[str, Any] | None = None, **sections: Any) -> list[sweep_plan.Run]:
    return sweep_plan.expand(sweep_file.read(write_fake(folder, arguments, **sections)))


def test_every_entry_times_every_point_times_every_seed(tmp_path: Path) -> None:
    runs = runs_of(
        tmp_path,
        {"learning_rate": 0.1, "max_steps": 5},
        grid={"meft.adapter.rows": [64, 128], "arguments.learning_rate": [1e-3, 3e-3]},
        list=[{"zero_optimization.stage": 2, "meft.adapter.top_k": 7}, {"optimizer.type": "AdamW"}],
        seeds=[0, 1],
    )
    assert len(runs) == 16 and len({json.dumps(run.identity(), sort_keys=True) for run in runs}) == 16
    first, last = runs[0], runs[-1]
    assert first.config["meft"]["adapter"] == {"rows": 64, "top_k": 7, "seed": 0}
    assert first.config["zero_optimization"] == {"stage": 2} and last.config["zero_optimization"] == {"stage": 0}
    assert first.arguments == {"learning_rate": 1e-3, "max_steps": 5, "seed": 0}
    assert last.config["optimizer"] == {"type": "AdamW"} and last.config["meft"]["adapter"] == {"rows": 128, "seed": 1}
    assert last.arguments == {"learning_rate": 3e-3, "max_steps": 5, "seed": 1}
    assert [run.arguments["seed"] for run in runs[:4]] == [0, 1, 0, 1], "the last varies fastest"
    assert first.name == "stage2-top_k7-rows64-learning_rate0.001-seed0"


def test_an_argument_that_is_not_given_follows_the_json(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, list=[{"optimizer.params.lr": 0.02, "gradient_clipping": "auto"}])
    assert run.arguments == {"learning_rate": 0.02}
    sweep_plan.check([run])
    (run,) = runs_of(tmp_path, {"learning_rate": 0.01}, list=[{"optimizer.params.lr": 0.02}])
    with pytest.raises(DataError, match=r"arguments.learning_rate = 0.01 and optimizer.params.lr = 0.02"):
        sweep_plan.check([run])


def test_yaml_is_read_as_version_1_2_has_it(tmp_path: Path) -> None:
    path = write_fake(tmp_path)
    text = path.read_text().replace("arguments: {}", "arguments: {a: 1e-3, b: no, c: 1:30:00, d: 0x1f, e: true, f: }")
    path.write_text(text)
    found = sweep_file.read(path).base.arguments
    assert found == {"a": 1e-3, "b": "no", "c": "1:30:00", "d": "0x1f", "e": True, "f": None}
    path.write_text(text + "\nseeds: [1]\nseeds: [2]\n")
    with pytest.raises(DataError, match="the key 'seeds' stands twice"):
        sweep_file.read(path)


def test_objects_of_python_are_refused(tmp_path: Path) -> None:
    path = write_fake(tmp_path)
    path.write_text(path.read_text() + "\nseeds: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(DataError, match="is no YAML"):
        sweep_file.read(path)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"gird": {}}, "there is no field gird .*did you mean grid"),
        ({"resources": {"gpu": 2}}, "there is no field resources.gpu .*did you mean gpus"),
        ({"resources": {"slurm": {"partitions": "x"}}}, "resources.slurm.partitions .*did you mean partition"),
        ({"resources": {"gpus": -1}}, "resources.gpus = -1 is not valid: it should be greater than or equal to 0"),
        ({"resources": {"slurm": {"time": "2 hours"}}}, "'2 hours' is no time; write minutes"),
        ({"resources": {"slurm": {"account": "a\nrm -rf x"}}}, "resources.slurm.account: .* is not a line of text"),
        ({"grid": {"meft.adapter.rows": []}}, "grid.meft.adapter.rows is empty"),
        ({"grid": {"meft..rows": [1]}}, "grid has the key 'meft..rows'; write a dotted one"),
        ({"grid": {"arguments.output_dir": ["a"]}}, "arguments.output_dir is set by the sweep"),
        ({"grid": {"arguments.a b": ["a"]}}, "grid has the key 'arguments.a b'"),
        ({"grid": {"a": [1]}, "list": [{"a": 2}]}, "a stands in grid and in list.0"),
        ({"grid": {"arguments.seed": [1]}, "seeds": [1]}, "arguments.seed stands in grid beside seeds"),
        ({"seeds": [1, 1]}, r"seeds = \[1, 1\] has one twice"),
        ({"evaluate": {"data": "nowhere.jsonl"}}, "'nowhere.jsonl' does not exist"),
        ({"seeds": [1, 2, 3], "budget": {"runs": 2}}, "budget.runs = 2 is less than the 3 runs"),
        ({"list": [{"a": 1}, {"a": 1}]}, "runs 0 and 1 are the same"),
        ({"list": [{"maft.adapter.rows": 1}]}, "'maft', which base.config does not have; did you mean 'meft'"),
        ({"list": [{"zero_optimization.stage.x": 1}]}, "zero_optimization.stage = 0 in base.config is no object"),
        ({"list": [{"meft.adapter.rows": 0}]}, "run rows0: .*adapter.rows = 0 is not valid"),
        ({"list": [{"meft.adapter.rwos": 8}]}, 'has no field adapter.rwos .*did you mean "rows"'),
    ],
)
def test_a_mistake_gets_one_sentence(sections: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        sweep_plan.check(runs_of(tmp_path, **sections))
    assert "\n" not in str(caught.value)


def test_arguments_are_parsed_by_the_training_script(tmp_path: Path) -> None:
    path = write_fake(tmp_path, {"model_name_or_path": "m", "train_file": "a", "learning_rate": 0.1, "bf16": True})
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "script:" not in line))
    sweep_plan.check(sweep_plan.expand(sweep_file.read(path)))
    for former, wrong, sentence in (
        ("learning_rate: 0.1", "learning_rate: high", "invalid float value: 'high'"),
        ("learning_rate: 0.1", "laerning_rate: 1", "--laerning_rate=1 is not an option; did you mean --learning_rate"),
        ("train_file: a", "train_file:", "neither is given"),
    ):
        text = path.read_text()
        path.write_text(text.replace(former, wrong))
        with pytest.raises(DataError, match=sentence):
            sweep_plan.check(sweep_plan.expand(sweep_file.read(path)))
        path.write_text(text)


def test_what_runs_are_asked_is_read_before_they_start(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"question": "a", "answer": ["5", "five"]}')

    def check(arguments: dict[str, Any]) -> list[str]:
        evaluate = {"data": str(tmp_path / "set.jsonl"), "arguments": arguments}
        runs = runs_of(tmp_path, {"model_name_or_path": "m"}, evaluate=evaluate)
        sweep_plan.check(runs)
        return sweep_plan.evaluation_options(runs[0], "FOLDER")

    columns = {"prompt_column": "question", "completion_column": "answer"}
    options = check({**columns, "max_new_tokens": 3, "final_number": False})
    assert options == [
        *("--model=m", "--adapter=FOLDER", "--log=FOLDER", "--predictions=FOLDER/answers.jsonl"),
        *("--prompt_column=question", "--completion_column=answer", "--max_new_tokens=3"),
        *("--data", str(tmp_path / "set.jsonl")),
    ]
    for arguments, sentence in (
        ({}, "evaluate: data .* has no column 'prompt'"),
        ({**columns, "final_number": True}, "evaluate: example 1 of data .* has no number in 'answer'"),
        ({**columns, "max_new_tokens": "few"}, "evaluate: argument --max_new_tokens: invalid int value: 'few'"),
        ({**columns, "bach_size": 3}, "evaluate: unrecognized arguments: --bach_size=3"),
        ({**columns, "adapter": "other"}, "evaluate.arguments: adapter is set by the sweep"),
    ):
        with pytest.raises(DataError, match=sentence):
            check(arguments)
    (tmp_path / "set.jsonl").write_text('{"question": "a", "answer": "5"}')
    assert check({**columns, "final_number": True})[-1] == "--final_number"


# What is there already


def make(folder: Path, **sections: Any) -> list[Path]:
    runs = runs_of(folder, **sections)
    folders = sweep_plan.match(runs, folder / "out")
    for run, place in zip(runs, folders, strict=True):
        if not place.exists():
            sweep_plan.make_folder(run, place)
    return folders


def test_runs_may_be_added_and_keep_their_folders(tmp_path: Path) -> None:
    former = make(tmp_path, grid={"meft.adapter.rows": [64, 256]})
    assert [path.name for path in former] == ["000-rows64", "001-rows256"]
    later = make(tmp_path, grid={"meft.adapter.rows": [64, 128, 256]})
    assert [path.name for path in later] == ["000-rows64", "002-rows128", "001-rows256"]
    assert sweep_plan.existing(tmp_path / "out") == sorted(later)


def test_a_changed_file_is_refused_with_the_difference(tmp_path: Path) -> None:
    make(tmp_path, grid={"meft.adapter.rows": [64, 256]})
    for grid, sentence in (
        ({"meft.adapter.rows": [64, 512]}, "001-rows256 was made with meft.adapter.rows = 256, and the file says 512"),
        ({"meft.adapter.rows": [64]}, "001-rows256 is there and the file has no such run any more"),
    ):
        with pytest.raises(DataError, match=sentence):
            make(tmp_path, grid=grid)
    with pytest.raises(DataError, match=r"000-rows64 was made with arguments.max_steps = None, and the file says 9"):
        make(tmp_path, grid={"meft.adapter.rows": [64, 256], "arguments.max_steps": [9]})


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_fake(tmp_path, seeds=[3, 4])
    assert sweep.main([str(path), "--output", str(tmp_path / "out"), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "000-seed3" in printed and "2 runs; nothing was started" in printed
    assert not (tmp_path / "out").exists()


def test_the_example_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    root = Path(sweep.__file__).parents[1]
    for name in ("ds_configs", "launch"):
        (tmp_path / name).symlink_to(root / name)
    (tmp_path / "runs" / "facts").mkdir(parents=True)
    (tmp_path / "runs" / "facts" / "trained.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.chdir(tmp_path)
    assert sweep.main(["launch/sweeps/demo.yaml", "--output", "runs/sweep", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "005-rows4096-learning_rate0.00125-seed0" in printed and "6 runs; nothing was started" in printed
    broken = Path("launch/sweeps/demo.yaml").read_text().replace("max_steps: 12", "max_stepps: 12")
    Path("broken.yaml").write_text(broken)
    assert sweep.main(["broken.yaml", "--output", "runs/sweep"]) == 2
    *_, told = capsys.readouterr().err.splitlines()
    assert told.startswith("sweep.py: run rows1024") and "did you mean --max_steps?" in told


def test_names_of_folders_need_no_quoting(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, list=[{"arguments.title": "$(touch x); 'a' \"b\" /etc/../c é", "meft.adapter.rows": 8}])
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*-rows8", run.name) and len(run.name) <= 60
