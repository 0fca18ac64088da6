"""The command line of fine-tuning: help that fits on two screens, and one sentence for each mistake."""

from __future__ import annotations

from types import SimpleNamespace

import finetune
import pytest
from data import DataError
from finetune_arguments import DataArguments, Parser


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"train_file": "a", "max_length": 1}, "max_length = 1 holds no prompt"),
        ({}, "of --train_file and --dataset_name, neither is given"),
        ({"train_file": "a", "dataset_name": "b"}, "both is given"),
        ({"train_file": "a", "data_format": "chat"}, "data_format = 'chat' is not known; use auto, prompt_completion"),
        ({"train_file": "a", "eval_file": "b", "eval_share": 0.1}, "more than one is given"),
        ({"train_file": "a", "eval_share": 1.0}, "eval_share = 1 is not a share"),
        ({"train_file": "a", "eval_split": "test"}, "--eval_split names a part of --dataset_name"),
        ({"train_file": "a", "streaming": True, "eval_share": 0.1}, "which --streaming does not; use --eval_file"),
    ],
)
def test_options_that_do_not_go_together_get_one_sentence(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DataArguments(**options)


GOOD = ["--model_name_or_path", "m", "--train_file", "a.jsonl", "--output_dir", "out"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([*GOOD, "--train_fle", "b"], "--train_fle is not an option; did you mean --train_file?"),
        ([*GOOD, "--learning_rate", "high"], ": invalid float value: 'high'"),
        ([*GOOD, "--max_length", "1"], "max_length = 1 holds no prompt"),
        (["--train_file", "a.jsonl"], "the following arguments are required: --model_name_or_path"),
        ([*GOOD, "--lr_scheduler_type", "bogus"], "bogus"),
        ([*GOOD, "--load_best_model_at_end", "True"], "requires the save and eval strategy to match"),
    ],
)
def test_a_wrong_command_line_gets_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as raised:
        Parser().parse([*arguments, "--use_cpu"])
    assert raised.value.code == 2
    *_, told = capsys.readouterr().err.splitlines()  # whatever libraries warn of comes before
    assert told.startswith("finetune.py: ") and sentence in told


def test_help_fits_on_two_screens_and_names_every_option_of_its_own() -> None:
    text = Parser().format_help()
    lines = text.splitlines()
    assert len(lines) <= 48 and max(map(len, lines)) <= 110
    for name in ("model_name_or_path", *DataArguments.__dataclass_fields__, "learning_rate", "deepspeed"):
        assert f"--{name} " in text
    assert "--adam_beta1" in Parser().format_everything()


def test_the_parsed_options_are_those_given() -> None:
    model, data, training = Parser().parse(
        [*GOOD, "--streaming", "--packing", "False", "--max_steps", "3", "--use_cpu"]
    )
    assert model.model_name_or_path == "m" and data.streaming and not data.packing and training.max_steps == 3
    with pytest.raises(DataError, match="--max_steps"):
        finetune.require_steps(Parser().parse([*GOOD, "--use_cpu"])[2], streaming=True)


@pytest.mark.parametrize(("named", "used"), [("ds.json", True), (None, False)])
def test_deepspeed_is_used_where_it_is_named(named: str | None, used: bool) -> None:
    args = SimpleNamespace(deepspeed=named)
    finetune.require_deepspeed(SimpleNamespace(args=args, is_deepspeed_enabled=used))


def test_an_environment_that_leaves_deepspeed_out_is_refused() -> None:
    accelerator = SimpleNamespace(distributed_type="MULTI_CPU")
    trainer = SimpleNamespace(args=SimpleNamespace(deepspeed="ds.json"), is_deepspeed_enabled=False)
    trainer.accelerator = accelerator
    with pytest.raises(DataError, match=r"'ds.json' would not be used: .* MULTI_CPU .* unset ACCELERATE_USE_CPU"):
        finetune.require_deepspeed(trainer)
