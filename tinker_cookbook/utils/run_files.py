"""Names of the files in a run directory."""

__all__ = [
    "CHECKPOINTS_FILE",
    "CODE_DIFF_FILE",
    "CONFIG_FILE",
    "METRICS_FILE",
    "SAMPLES_FILE",
    "TIMING_FILE",
]

CONFIG_FILE = "config.json"
CODE_DIFF_FILE = "code.diff"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS_FILE = "checkpoints.jsonl"
SAMPLES_FILE = "samples.jsonl"
TIMING_FILE = "timing_spans.jsonl"
