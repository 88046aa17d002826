"""Load pipelines, run them once for each prompt, and write a record next to each output."""

from __future__ import annotations

from visattn.generation.batch import Item, Outcome, generate_all, read_prompts
from visattn.generation.clip_shapes import read_shapes, shape_of
from visattn.generation.errors import GenerationError
from visattn.generation.job import Job, Result, run_job
from visattn.generation.loading import Loading, Lora, default_model, load_pipeline
from visattn.generation.record import read_record, record_path

__all__ = [
    "GenerationError",
    "Item",
    "Job",
    "Loading",
    "Lora",
    "Outcome",
    "Result",
    "default_model",
    "generate_all",
    "load_pipeline",
    "read_prompts",
    "read_record",
    "read_shapes",
    "record_path",
    "run_job",
    "shape_of",
]
