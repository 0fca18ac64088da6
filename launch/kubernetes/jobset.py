"""Writes the manifest of a JobSet that trains on several nodes of Kubernetes, and goes on after a disruption.

    python launch/kubernetes/jobset.py --name first --image IMAGE --nodes 2 --gpus 8 --claim data -- \\
        launch/finetune.py --deepspeed ds_configs/meft_24gb.json --model_name_or_path /data/model \\
        --train_file /data/train.jsonl --output_dir /data/runs/first --bf16 | kubectl apply -f -

One pod a node; each starts its ranks with torchrun. When a pod has to go, Kubernetes sends SIGTERM, the training saves,
and JobSet starts all pods anew, which go on from the newest whole checkpoint. Validated against ``jobset_schema.json``,
the part of JobSet's definition that is used here, before it is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCHEMA = Path(__file__).with_name("jobset_schema.json")
_PORT = 29500
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


class ManifestError(ValueError):
    """A manifest that JobSet would refuse; the message is one sentence that names the field and the value."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what follows ``--`` is the script and its arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="of the JobSet: lower-case letters, digits, dashes")
    parser.add_argument(
        "--image", required=True, help="with this project installed, and its folder as working directory"
    )
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1, help="of each node; a rank for each")
    parser.add_argument("--memory", default="64Gi", help="of each node; rows live there")
    parser.add_argument("--cpus", default="8", help="of each node; they update the rows")
    parser.add_argument("--claim", required=True, help="PersistentVolumeClaim that all nodes can write, seen as /data")
    parser.add_argument("--grace", type=int, default=120, help="seconds that a pod gets to save and end")
    parser.add_argument("--restarts", type=int, default=10, help="after failures; disruptions do not count")
    parser.add_argument("command", nargs="+", help="the script and its arguments, behind --")
    return parser.parse_args(argv)


def manifest(args: argparse.Namespace) -> dict[str, Any]:
    """The JobSet as a dictionary.

    Raises:
        ManifestError: if a value does not fit.
    """
    script, *options = args.command
    if not any(option.split("=")[0] == "--resume_from_checkpoint" for option in options):
        options.append("--resume_from_checkpoint=auto")
    host = f"{args.name}-worker-0-0.{args.name}"
    launch = ["python", "-m", "torch.distributed.run", f"--nnodes={args.nodes}", f"--nproc_per_node={args.gpus}"]
    launch += ["--node_rank=$(NODE_RANK)", f"--master_addr={host}", f"--master_port={_PORT}"]
    amounts = {"cpu": args.cpus, "memory": args.memory, "nvidia.com/gpu": str(args.gpus)}
    container = {
        "name": "train",
        "image": args.image,
        # No shell reads this. Kubernetes itself replaces $(NAME), and $$( stands for $(.
        "command": [*launch, script, *(option.replace("$(", "$$(") for option in options)],
        "env": [{"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": _INDEX}}}],
        "resources": {"limits": amounts, "requests": dict(amounts)},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": args.grace,
        "containers": [container],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": args.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # rows that ranks of a node share live there
        ],
    }
    job = {
        "completionMode": "Indexed",
        "parallelism": args.nodes,
        "completions": args.nodes,
        "backoffLimit": 0,  # ranks cannot go on without one of them
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]}]},
        "template": {"spec": pod},
    }
    # A job that a disruption ended fails for the reason PodFailurePolicy.
    disrupted = {
        "name": "disrupted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    found = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": args.name, "namespace": args.namespace},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": args.name},
            "failurePolicy": {"maxRestarts": args.restarts, "rules": [disrupted]},
            "replicatedJobs": [{"name": "worker", "replicas": 1, "template": {"spec": job}}],
        },
    }
    validate(found)
    return found


def validate(found: Any) -> None:
    """Check a manifest against the schema.

    Raises:
        ManifestError: naming the first field that does not fit, and its value.
    """
    import jsonschema

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(found))
    if error is not None:
        raise ManifestError(f"{error.json_path.removeprefix('$.')}: {error.message}; see {SCHEMA.name}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line, see the top of this file."""
    import yaml

    args = parse_arguments(argv)
    try:
        print(yaml.safe_dump(manifest(args), sort_keys=False, width=120), end="")
    except ManifestError as error:
        sys.exit(f"jobset.py: {error}")


if __name__ == "__main__":
    main()
