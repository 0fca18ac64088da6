"""`launch/generate.py`: where prompts come from, and a chat with a scripted user."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import chat
import generate
import inference
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from meft_engine.adapter.attach import attach
from meft_engine.checkpoint.export import save_adapter
from tests.families import VOCAB, fill_values, tiny_config, tiny_llama

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["--model", "m", "--adapter", "a"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    marks = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", "<system>"]
    words = {word: i for i, word in enumerate([*marks, *(f"w{i}" for i in range(len(marks), VOCAB))])}
    model = Tokenizer(models.WordLevel(words, unk_token="w6"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"pad_token": "<pad>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template=template, **tokens)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with its tokenizer in ``base``, and an adapter of it in ``adapter``."""
    folder = tmp_path_factory.mktemp("generate")
    tiny_llama().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    attached = attach(tiny_llama(), tiny_config(), compute_dtype=torch.float32)
    fill_values(attached)
    save_adapter(attached, folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def loaded(folders: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    return inference.load_model(str(folders / "base"), str(folders / "adapter"), "fp32")


def scripted(*lines: str):
    """What ``input`` gives to a user who types these lines and then Ctrl-D."""
    left = list(lines)

    def read(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    return read


# Prompts


def test_prompts_come_from_the_line_a_file_or_the_standard_input(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("one\n\n  two \n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("three\n\nfour\n"))
    assert generate.parse_arguments([*NAMES, "--prompt", "a b", "c"]).prompts == ["a b", "c"]
    assert generate.parse_arguments([*NAMES, "--file", str(tmp_path / "prompts.txt")]).prompts == ["one", "  two "]
    found = generate.parse_arguments(NAMES)
    assert found.prompts == ["three", "four"] and found.max_new_tokens == 64 and found.rows == "host"
    found = generate.parse_arguments([*NAMES, "--chat", "--system", "be brief"])
    assert found.prompts is None and found.max_new_tokens == 256


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", "a", "--chat"], "not allowed with argument"),
        (["--prompt", "a", "--file", "b"], "not allowed with argument"),
        (["--file", "missing.txt"], "--file missing.txt does not exist"),
        (["--prompt", "a", "--system", "b"], "--system belongs to --chat"),
        ([], "there is no prompt"),
        (["--prompt", "a", "--rows", "gpu"], "invalid choice: 'gpu'"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(SystemExit):
        generate.parse_arguments([*NAMES, *arguments])
    assert sentence in capsys.readouterr().err


def test_answers_are_printed_on_lines_of_their_own(folders, loaded, monkeypatch, capsys):
    prompts = ["w9 w20", "w31"]
    line = ["--model", str(folders / "base"), "--adapter", str(folders / "adapter"), "--rows", "device"]
    monkeypatch.setattr("sys.argv", ["generate.py", *line, "--dtype", "fp32", "--prompt", *prompts])
    generate.main()
    assert capsys.readouterr().out.splitlines() == inference.greedy_answers(*loaded, prompts, max_new_tokens=64)


# Chat


def expected_chat(model, tokenizer, questions, max_new_tokens, system=None) -> list[dict[str, str]]:
    """Turn by turn, from scratch and without streaming."""
    messages = [{"role": "system", "content": system}] if system else []
    for question in questions:
        messages.append({"role": "user", "content": question})
        text = " ".join(f"<{m['role']}> {m['content']}" for m in messages) + " <assistant>"
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(text.split())])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, use_cache=False
        )
        answer = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer.strip()})
    return messages


@pytest.mark.parametrize("end", [[], [""], ["  "], ["/exit"]], ids=["Ctrl-D", "empty", "blank", "/exit"])
def test_a_chat_keeps_the_conversation_until_its_end(end, loaded, capsys):
    questions = ["w9 w20", "w31"]
    found = chat.chat(*loaded, 5, "w50", scripted(*questions, *(end + ["w8"] if end else end)))
    assert found == expected_chat(*loaded, questions, 5, "w50")
    printed = capsys.readouterr().out
    answers = [message["content"] for message in found if message["role"] == "assistant"]
    assert [line.strip() for line in printed.splitlines() if line.strip()] == [answer for answer in answers if answer]
    assert any(answers)


def test_tokens_are_printed_as_they_come(loaded, monkeypatch):
    """Some of an answer is on the screen before it is complete."""
    model, tokenizer = loaded
    screen, seen = io.StringIO(), []
    monkeypatch.setattr("sys.stdout", screen)
    handle = model.register_forward_hook(lambda *a: seen.append(len(screen.getvalue())))
    try:
        chat.chat(model, tokenizer, 6, read=scripted("w9 w20"))
    finally:
        handle.remove()
    assert len({length for length in seen if 0 < length < len(screen.getvalue())}) > 1


def test_an_answer_that_is_interrupted_stays_as_far_as_it_came(loaded):
    model, tokenizer = loaded
    whole = chat.chat(model, tokenizer, 6, read=scripted("w9 w20"))[-1]["content"]
    calls = []

    def interrupt(*args) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = model.register_forward_hook(interrupt)
    try:
        found = chat.chat(model, tokenizer, 6, read=scripted("w9 w20"))
    finally:
        handle.remove()
    assert whole.startswith(found[-1]["content"]) and len(found[-1]["content"]) < len(whole)


def test_a_tokenizer_without_a_template_is_refused_before_the_model_is_loaded(folders, tmp_path, monkeypatch):
    make_tokenizer(None).save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["generate.py", "--model", str(tmp_path), "--chat"])
    monkeypatch.setattr(generate, "load_model", lambda *a: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match="has no chat template, so it cannot chat; use a model"):
        generate.main()


def test_the_tokenizer_that_was_saved_with_the_adapter_is_taken(folders, tmp_path):
    make_tokenizer("own").save_pretrained(tmp_path)
    assert inference.load_tokenizer(str(folders / "base"), str(tmp_path)).chat_template == "own"
    assert inference.load_tokenizer(str(folders / "base"), str(folders / "adapter")).chat_template == TEMPLATE


def test_a_chat_through_the_command_line(folders, loaded):
    """The user's lines come through a pipe, as from a script."""
    command = [sys.executable, "launch/generate.py", "--model", folders / "base", "--adapter", folders / "adapter"]
    options = ["--chat", "--dtype", "fp32", "--max_new_tokens", "5"]
    done = subprocess.run(
        [*map(str, command), *options], cwd=ROOT, input="w9 w20\n/exit\n", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = expected_chat(*loaded, ["w9 w20"], 5)[-1]["content"]
    assert done.stdout.replace("> ", "").strip() == answer
