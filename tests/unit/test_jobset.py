"""The manifest for Kubernetes: what it holds, that it is valid, and that a changed field is not."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("jsonschema")

PATH = Path(__file__).parents[2] / "launch" / "kubernetes" / "jobset.py"
spec = importlib.util.spec_from_file_location("jobset", PATH)
jobset = importlib.util.module_from_spec(spec)
spec.loader.exec_module(jobset)

ODD = "a 'b' \"c\": {d} # $(NODE_RANK) `e`; - \n%"
GIVEN = ["--name", "first", "--image", "registry.example/meft:1", "--nodes", "2", "--gpus", "8", "--claim", "data"]
COMMAND = ["--", "launch/finetune.py", "--deepspeed", "c.json", "--chat_template", ODD]


def printed(capsys: pytest.CaptureFixture, *arguments: str) -> dict[str, Any]:
    jobset.main([*GIVEN, *arguments, *COMMAND])
    return yaml.safe_load(capsys.readouterr().out)


def container_of(manifest: dict[str, Any]) -> dict[str, Any]:
    (job,) = manifest["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]["containers"][0]


def test_it_starts_a_pod_for_each_node_that_goes_on_after_a_disruption(capsys: pytest.CaptureFixture) -> None:
    found = printed(capsys)
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (2, 2, "Indexed")
    command = container_of(found)["command"]
    assert {"--nnodes=2", "--nproc_per_node=8", "--master_addr=first-worker-0-0.first"} <= set(command)
    assert command[-1] == "--resume_from_checkpoint=auto"
    # Kubernetes replaces $(NODE_RANK) in our option, and gives $( back for $$( in the user's.
    assert "--node_rank=$(NODE_RANK)" in command and ODD.replace("$(", "$$(") in command
    assert container_of(found)["resources"]["limits"]["nvidia.com/gpu"] == "8"


MUTATIONS = [
    (("kind",), "JobSett", "kind"),
    (("apiVersion",), "jobset.x-k8s.io/v1", "apiVersion"),
    (("metadata", "name"), "First_Run", "metadata.name"),
    (("spec", "replicatedJob"), [], "spec"),
    (("spec", "failurePolicy", "maxRestarts"), "ten", "spec.failurePolicy.maxRestarts"),
    (("spec", "failurePolicy", "rules", 0, "action"), "Restart", "action"),
    (("spec", "replicatedJobs", 0, "template", "spec", "parallelism"), 0, "parallelism"),
    (("spec", "replicatedJobs", 0, "template", "spec", "completionMode"), "indexed", "completionMode"),
    (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "restartPolicy"), "Always", "restartPolicy"),
]
"""Where, what it becomes, and what the sentence names."""


@pytest.mark.parametrize(("where", "value", "named"), MUTATIONS, ids=[".".join(map(str, m[0])) for m in MUTATIONS])
def test_a_changed_field_is_refused(where: tuple, value: Any, named: str, capsys: pytest.CaptureFixture) -> None:
    found = printed(capsys)
    jobset.validate(copy.deepcopy(found))
    place = found
    for part in where[:-1]:
        place = place[part]
    place[where[-1]] = value
    with pytest.raises(jobset.ManifestError, match=named):
        jobset.validate(found)


def test_a_field_that_is_missing_is_refused(capsys: pytest.CaptureFixture) -> None:
    found = printed(capsys)
    del container_of(found)["image"]
    with pytest.raises(jobset.ManifestError, match="'image' is a required property"):
        jobset.validate(found)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--name", "No Name"], "metadata.name.*'No Name'"),
        (["--memory", "lots"], "memory.*'lots'"),
        (["--claim", "a/b"], "claimName.*'a/b'"),
        (["--image", "a b"], "image.*'a b'"),
        (["--nodes", "0"], "parallelism|completions"),
    ],
)
def test_a_wrong_value_gets_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        jobset.main([*GIVEN, *arguments, *COMMAND])
