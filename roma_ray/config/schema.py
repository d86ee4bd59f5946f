"""The whole configuration, as typed, frozen models; `config/loading.py` reads it.

Every field is documented under its name. The resolved configuration is saved with each run (`to_yaml`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from roma_ray.borders.addresses import has_secret
from roma_ray.config.baseline_settings import BaselinesConfig
from roma_ray.config.finetune_settings import FinetuneConfig
from roma_ray.config.free_form import FREE, SuccessConfig, free_form_fault
from roma_ray.config.ray_settings import RayConfig
from roma_ray.config.section import Name, Section, TaskName
from roma_ray.config.split_settings import SplitsConfig
from roma_ray.errors import ConfigError

EMBEDDED = "assets:model"
INSTRUCTION = "Answer with the letter of the right choice."


class ColumnsConfig(Section):
    """Where a data set's rows keep what a question is made of: dotted paths; of a list of objects, each one's field."""

    question: str = Field(default="question", min_length=1)
    """Its text."""
    choices: str | tuple[str, ...] = Field(default="choices", min_length=1)
    """One list, or several columns with a choice each."""
    answer: str = Field(default="answer", min_length=1)
    """A choice's label, letter, index from 0, or text."""
    labels: str | None = None
    """What the answer calls a choice; default: `label` beside choices that end in `text`."""
    context: str | None = None
    """A passage; default: `context`, where there is one. So with the next three."""
    id: str | None = None
    """Text or number, unique over all sources."""
    task: str | None = None
    """What the tables group by."""
    split: str | None = None
    """train, validation or test, in a file."""


class QuestionSource(Section):
    """One source of questions: a file or a dataset of the Hugging Face hub."""

    path: str | None = None
    """A .jsonl, .jsonl.gz or .parquet file. `assets:NAME` names a file that ships with the package."""
    dataset: str | None = None
    """A name of the dataset registry (roma_ray/questions/dataset_registry.py), or any hub id (`owner/name`)."""
    columns: ColumnsConfig | None = None
    """How rows of another shape are read. ARC's and OpenBookQA's shape needs none."""
    subset: str | None = None
    """Configuration of a hub id: `ARC-Easy`."""
    part: str = Field(default="train", min_length=1)
    """Split of a hub id that is loaded; its questions are of that split too, where `split` names none."""
    task: TaskName | None = None
    """Overrides the rows' task."""
    split: Literal["train", "validation", "test"] | None = None
    """Overrides the rows' split."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many rows: of a file its first ones, of a dataset a seeded sample."""

    @model_validator(mode="after")
    def _one_origin(self) -> QuestionSource:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give exactly one of `path` and `dataset`")
        hub_id = self.dataset is not None and "/" in self.dataset
        if not hub_id and (self.subset is not None or self.part != "train"):
            raise ValueError("`subset` and `part` are of a hub id (`dataset: owner/name`)")
        if self.columns is not None and self.dataset is not None and not hub_id:
            raise ValueError("a registered dataset needs no `columns`; a hub id is written `owner/name`")
        return self

    @property
    def rows_split(self) -> str | None:
        """The split that all its rows have; None where the rows say it."""
        if self.split is None and self.dataset is not None and self.part in ("validation", "test"):
            return self.part
        return self.split


class PromptConfig(Section):
    """How a question becomes a prompt."""

    format: Literal["letter", "cloze", "free"] = "letter"
    """`letter`: lettered choices, scored by the letters' logits. `cloze`: each choice's log-likelihood; the embedded model's
    own format, and its default. `free`: rows have no choices, their answer is a text (docs/free_form.md)."""
    instruction: str = INSTRUCTION
    """First line of a `letter` prompt; empty for none."""
    chat_template: bool = False
    """Wrap the prompt in the tokenizer's chat template."""
    max_tokens: int = Field(default=2048, ge=8)
    """Longest prompt with its longest choice (`free`: with its answer); context is shortened to fit, longer questions are rejected."""
    context: bool = True
    """Include a question's context (a passage) in its prompt."""
    cloze_score: Literal["normalized", "raw"] = "normalized"
    """`cloze` answers by log-likelihood per character of the choice (lm-evaluation-harness's acc_norm) or raw (acc)."""


class QuestionsConfig(Section):
    """What is asked."""

    sources: tuple[QuestionSource, ...] = Field(min_length=1)
    """Read in this order; ids must be unique over all of them."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    """Part of the training questions held out by seed: never trained on, never a neighbor; settings are chosen on it."""
    test_fraction: float = Field(default=0.2, gt=0, lt=0.9)
    """Part held out for testing, by seed, when the sources declare no test rows."""
    splits: SplitsConfig | None = None
    """In place of both fractions: each task divided alike, `{train: 0.7, validation: 0.15, test: 0.15}`. What a task's rows
    declare as validation or test stays so; its other rows are divided among the parts left, in this proportion."""
    held_out_tasks: tuple[TaskName, ...] = ()
    """Never trained on, never validated on, never neighbors; their test questions are judged apart from the trained tasks'."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Part of the training questions to use: nested prefixes of one seeded permutation (Figure 9)."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of all that is drawn from the data: splits, data sets' samples, `fraction`; default: the run's own. With it set,
    `seed` varies the training alone, and with it neighbors that are drawn (`random`, `task`, `shuffled`)."""
    prompt: PromptConfig = PromptConfig()


class ModelConfig(Section):
    """The mixture-of-experts model whose routers are tuned."""

    path: str
    """A local folder or a Hugging Face id. `assets:model` is the one that ships with the package."""
    revision: str | None = None
    """Commit of a hub model; pin it for runs that are to be repeated."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen weights; `auto` is the checkpoint's own. Gates always train as fp32 masters."""
    experts_backend: Literal["auto", "eager", "grouped_mm", "batched_mm"] = "auto"
    """Experts implementation of transformers; `auto` is eager on a CPU; on a GPU it is measured once and kept in the
    storage. batched_mm is for a few tokens at a time: on prompts it is many times slower."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation of transformers."""


class RoutingConfig(Section):
    """Which routing weights are tuned and compared."""

    layers: str | tuple[int, ...] = "L5"
    """Tuned layers: `L5`, `F2M3`, `All` ... (section 5.3 of the paper) or explicit indices of MoE layers."""
    tokens: str = "Last1"
    """Prompt positions whose mean routing row is r_i: First1, Middle1, Last1, First3, Middle3, Last3. Of `free` questions also
    `Answer`: where the answer's tokens are predicted, the last prompt token and those of the answer but its last."""


class ExtractionConfig(Section):
    """The one pass over all questions: routing weights, answers, and activations at the cut."""

    batch_tokens: int = Field(default=4096, ge=16)
    """Tokens of a planned batch."""
    cache: bool = True
    """Keep the activations at the cut. Without, training and evaluation run the frozen layers again whenever they need them."""
    activation_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the cached activations; `auto` is the model's own (bf16 for most), which loses nothing."""
    max_failed: float = Field(default=0.05, ge=0, le=1)
    """Share of the questions that may fail (non-finite scores, tokens that the model does not know, a killed worker) and are
    then set aside; with more the extraction is refused. No part of any fingerprint."""
    success: SuccessConfig = SuccessConfig()
    """Of `free` questions: when an answer of the base model is right (S of eq. 2)."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Most weights (GB) that an extraction worker holds at once; a larger model runs as a chain of layer slices. No part of
    any fingerprint: the results are the same, but a batch that fails ends the run, where whole models set a bad question
    aside. Of the extraction alone: finetuning holds the layers from the cut up (and without a cache those below too)."""
    chain: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Workers that hold the model between them, a slice of its layers each, and hand every batch's states on. `auto`: as few
    as have the memory. As many chains work side by side as there is room for. Of a cluster: one process streams
    (`memory_gb`) or holds the whole model. With `memory_gb` no slice is larger than that. In fingerprints, and of a batch
    that fails, as `memory_gb`."""


class EmbeddingConfig(Section):
    """The task embedding E of eq. 3-5."""

    model: str = "minilm"
    """A sentence-transformers name or folder. `minilm` is all-MiniLM-L6-v2: the PyPI package where installed, else the
    hub."""
    context: bool = False
    """Embed the context too; the fixed instruction never is."""
    batch_size: int = Field(default=64, ge=1)


def check_epsilon(epsilon: float) -> None:
    """The rule of eq. 4's epsilon, for whoever takes one. Raises ConfigError.

    A gaussian similarity is positive; a neighbor whose cosine is 0 or less weighs nothing (eq. 6).
    """
    if not 0 < epsilon <= 1:
        raise ConfigError(
            f"epsilon is a similarity above 0 and at most 1, not {epsilon:g}: neighbors of no similarity weigh nothing"
        )


class NeighborsConfig(Section):
    """The successful neighborhood N(x_i) of eq. 3-4 and its weights, eq. 5-6."""

    method: Literal["knn", "epsilon", "random", "task", "shuffled", "self"] = "knn"
    """Controls: `random` successes; `task`, random ones of the same task; `shuffled`, knn's neighborhoods dealt out anew; `self`,
    each question's own base routing."""
    k: int = Field(default=3, ge=1, le=10_000)
    """Neighbors of a question (knn, random, task, shuffled)."""
    epsilon: float = 0.5
    """Least similarity (epsilon), above 0 and at most 1."""
    similarity: Literal["gaussian", "cosine"] = "gaussian"
    sigma: float = Field(default=0.5, gt=0)
    """Width of eq. 5. On unit vectors eq. 5 is exp(-(1 - cos) / sigma^2). The reference code's 0.4 belongs to
    (1 - cos)^2 and does not carry over: here it would weigh a neighbor at cosine 0.6 as exp(-2.5) = 0.08."""
    backend: Literal["auto", "torch", "faiss"] = "auto"
    """Search library; the answer is the same."""
    exact_up_to: int = Field(default=200_000, ge=1)
    """knn over more successes than this goes by inverted lists, which find at least 95 % of the neighbors; the share is
    measured in each run and printed. (The epsilon-ball is always exact.)"""

    @field_validator("epsilon")
    @classmethod
    def _epsilon_fits(cls, value: float) -> float:
        check_epsilon(value)
        return value


class EvaluationConfig(Section):
    """How tuned routers are judged: beside what, and how benchmarks are run (`roma-ray evaluate --tasks`)."""

    task_loss_alone: bool = False
    """Also train the same head by the task loss alone (lambda = 0) and report, paired, what the regularizer adds. Of a run; no part of
    any fingerprint but the report's."""

    batch_tokens: int = Field(default=4096, ge=16)
    """Tokens of a planned batch of log-likelihoods; what requests begin with in common counts once."""
    generation_batch: int = Field(default=16, ge=1)
    """Prompts that are continued together."""
    keep_states: bool = False
    """Keep the trunk's states and the base's answers: later adapters with the same first tuned layer run the head alone.
    They take tokens x width x bytes of the type on the storage."""


class TrackingConfig(Section):
    """Where runs are recorded in MLflow. No part of any fingerprint: recording changes no result."""

    enabled: bool = True
    """Record runs (`roma-ray local` does so only with --track)."""
    uri: str | None = None
    """An MLflow server (http://host:5000) or database (sqlite:////absolute/path.db); default $MLFLOW_TRACKING_URI, else
    mlflow.db in the storage."""
    experiment: Name = Field(default="roma-ray", min_length=1, max_length=250)
    """Name of the MLflow experiment that holds all runs."""
    system_metrics: bool = True
    """Record CPU, memory, disk, network and GPU use of the driver's machine while the pipeline works."""
    log_model: bool = False
    """Also upload the whole tuned model, not only its adapter."""
    register_model: Name | None = Field(default=None, pattern=r"^[^/:'\"]+$")
    """Make the adapter a version of this model of MLflow's registry; default: it is a model of its run alone."""

    @field_validator("uri")
    @classmethod
    def _served(cls, value: str | None) -> str | None:
        if value is not None and value.rstrip("/") in {"sqlite:", "sqlite:///:memory:"}:
            raise ValueError("this database is gone when the run ends; name a file: sqlite:////absolute/path.db")
        if value is not None and has_secret(value):
            raise ValueError(
                "configurations are saved, so no password, token or key belongs here (nor what looks like one: all before an @): "
                "give the address in $MLFLOW_TRACKING_URI, or the password in $MLFLOW_TRACKING_PASSWORD"
            )
        if value is not None and (value.startswith("file:") or not (value == "databricks" or ":" in value)):
            raise ValueError(
                "give a server (http://...) or a database (sqlite:///...): MLflow keeps no plain folders any more"
            )
        return value


class Config(Section):
    """One run."""

    name: Name = "run"
    """Shown in tables and trackers; default: the configuration file's name, and the model's. Part of no fingerprint but those of
    the pages that print it: a renamed run computes nothing anew."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`cuda` also names ROCm devices, as in torch. `auto` takes a GPU where there is one."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads of each worker process. Sums depend on it in their last bits, so it is part of the fingerprint."""
    storage: str | None = None
    """Where artifacts live; default $ROMA_RAY_STORAGE, else ~/.roma-ray. Not part of any fingerprint."""
    reuse: Literal["any", "same_versions"] = "any"
    """Whether finished work of other library versions than those here may be used. `any` says where it is; `same_versions`
    refuses a stage that other versions of the libraries that decide its bits worked on. Not part of any fingerprint."""
    model: ModelConfig
    questions: QuestionsConfig
    routing: RoutingConfig = RoutingConfig()
    extraction: ExtractionConfig = ExtractionConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    neighbors: NeighborsConfig = NeighborsConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    tracking: TrackingConfig = TrackingConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="before")
    @classmethod
    def _format_of_the_model(cls, data: Any) -> Any:
        """Which prompt a model knows belongs to the model: the embedded one was never shown a lettered choice."""
        model, asked = (data.get("model"), data.get("questions")) if isinstance(data, Mapping) else (None, None)
        if not isinstance(model, Mapping) or not isinstance(asked, Mapping) or model.get("path") != EMBEDDED:
            return data
        prompt = asked.get("prompt", {})
        if not isinstance(prompt, Mapping) or "format" in prompt:
            return data
        return {**data, "questions": {**asked, "prompt": {**prompt, "format": "cloze"}}}

    @model_validator(mode="after")
    def _of_one_kind(self) -> Config:
        sources, success = self.questions.sources, self.extraction.success
        mapped = [source.columns for source in sources if source.columns is not None]
        fault = free_form_fault(
            free=self.questions.prompt.format == FREE,
            tokens=self.routing.tokens,
            registered=[source.dataset for source in sources if source.dataset and "/" not in source.dataset],
            choices=any(columns.choices != "choices" or columns.labels is not None for columns in mapped),
            positions=self.finetune.regularizer.positions,
            written=success.metric if success.writes else "",
            sliced=next((name for name in ("memory_gb", "chain") if getattr(self.extraction, name) is not None), ""),
        )
        if fault:
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _head_in_slices(self) -> Config:
        if self.finetune.chain is None:
            return self
        if not self.extraction.cache:
            raise ValueError(
                "finetune.chain divides the layers from the cut up, and without extraction.cache each worker would run those below it "
                "too: set extraction.cache to true, or leave finetune.chain out"
            )
        if self.questions.prompt.format == FREE and self.extraction.success.writes:
            raise ValueError(
                f"extraction.success.metric: {self.extraction.success.metric} writes answers with the whole model, and finetune.chain "
                "divides it: leave finetune.chain out, or set the metric to likelihood or verdict"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved configuration, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
