"""Plays a training for sweeps: counts steps, saves and leaves when it is asked to, goes on, fails if it is to.

Arguments are --name=value; of the launcher's own options it knows none and minds none.
"""

import json
import signal
import sys
import time
from pathlib import Path

options = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:] if a.startswith("--") and "=" in a)
folder, steps = Path(options["output_dir"]), int(options.get("max_steps", 3))
print("options", json.dumps(options), flush=True)
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda received, frame: asked.append(received))
step = 0
if "resume_from_checkpoint" in options:
    step = json.loads(Path(options["resume_from_checkpoint"], "trainer_state.json").read_text())["global_step"]
    print("goes on from", step, flush=True)
while step < steps:
    time.sleep(float(options.get("pause", 0.01)))
    step += 1
    print("step", step, flush=True)
    if options.get("fail") == str(step):
        sys.exit("it fails, as it was told to")
    if asked:
        saved = folder / f"checkpoint-{step}"
        (saved / f"global_step{step}").mkdir(parents=True)
        (saved / "latest").write_text(f"global_step{step}")
        (saved / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        sys.exit(75)
history = [{"loss": 2.0}, {"loss": 1.5}, {"eval_loss": 9}]
report = {"seconds_per_step": 0.1, "touched_share": 0.2, "host_bytes": 4096}
(folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
(folder / "train_report.json").write_text(json.dumps(report))
