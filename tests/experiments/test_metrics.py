"""Records survive restarts and dying processes."""

import json

from experiments import metrics


def test_a_restart_writes_the_same_bytes(tmp_path):
    def write(folder, start, stop):
        writer = metrics.Writer(folder, start_step=start)
        for step in range(start, stop):
            writer.metrics(step, {"loss": 1.0 / (step + 3)})
        writer.close()

    write(tmp_path / "whole", 0, 6)
    write(tmp_path / "parts", 0, 4)
    write(tmp_path / "parts", 2, 6)  # died after step 3, restored at step 2
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "parts/metrics.jsonl").read_bytes()


def test_half_a_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 0, "loss": 1.0}) + "\n" + '{"step": 1, "lo')
    assert metrics.read(path) == [{"step": 0, "loss": 1.0}]
    metrics.Writer(tmp_path, start_step=1).close()
    assert path.read_text() == json.dumps({"step": 0, "loss": 1.0}) + "\n"


def test_no_file_is_no_records(tmp_path):
    assert metrics.read(tmp_path / "metrics.jsonl") == []


def test_events_for_tensorboard(tmp_path):
    writer = metrics.Writer(tmp_path)
    writer.metrics(3, {"loss": 0.5})
    writer.timing(3, {"seconds": 1.5})
    writer.close()
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()
    assert metrics.read(tmp_path / "timing.jsonl") == [{"step": 3, "seconds": 1.5}]
