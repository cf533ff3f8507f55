"""What the loops need to know of a model kind: `Task`, and the kinds there are."""

from sophon.config import Config
from sophon.errors import UserError, choose
from sophon.models import ModelSpec, adapter_of
from sophon.tasks.classification import ClassificationTask
from sophon.tasks.denoising import DenoisingTask
from sophon.tasks.task import Measured, Metric, Task, evaluating

__all__ = [
    "TASKS",
    "ClassificationTask",
    "DenoisingTask",
    "Measured",
    "Metric",
    "Task",
    "evaluating",
    "kind_of",
    "make_task",
]

TASKS: dict[str, type[ClassificationTask] | type[DenoisingTask]] = {
    "classification": ClassificationTask,
    "denoising": DenoisingTask,
}


def kind_of(spec: ModelSpec) -> str:
    """Name the task that a model is made for."""
    return adapter_of(spec).kind


def make_task(config: Config, spec: ModelSpec, *, amp: bool, protects: bool = False) -> Task:
    """Make the task of a run.

    Args:
        protects: whether the suppression loss and the distillation of `MethodConfig` are needed.

    Raises:
        UserError: the task is not known, does not fit the model, or has no such suppression loss.
    """
    choose("task.name", config.task.name, TASKS)
    if config.task.gradient_checkpointing:
        if config.task.name != "denoising":
            raise UserError("task.gradient_checkpointing: only denoisers have it; give false")
        if protects and config.method.engine == "second_order":
            raise UserError(
                "task.gradient_checkpointing: not allowed with method.engine=second_order, which computes whole steps "
                "again (method.segment); give false, or engine first_order"
            )
    return TASKS[config.task.name].from_config(spec, config.task, config.method if protects else None, amp=amp)
