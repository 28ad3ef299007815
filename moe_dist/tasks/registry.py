"""Tasks by the name in a config's `task`."""

from moe_dist.config.messages import nearest
from moe_dist.config.schema import Config
from moe_dist.tasks.image_classification import ImageClassification
from moe_dist.tasks.language_model import LanguageModel
from moe_dist.tasks.masked_lm import MaskedLM
from moe_dist.tasks.question_answering import QuestionAnswering
from moe_dist.tasks.task import Task
from moe_dist.tasks.text_classification import TextClassification

TASKS: dict[str, type[Task]] = {
    "language_model": LanguageModel,
    "image_classification": ImageClassification,
    "pretraining": MaskedLM,
    "text_classification": TextClassification,
    "question_answering": QuestionAnswering,
}


def task_of(config: Config) -> type[Task]:
    """Looks up a config's task.

    Args:
        config: The run's config.

    Returns:
        The task's class.

    Raises:
        ValueError: The name is unknown, or a section has another task's type.
    """
    if config.task not in TASKS:
        raise ValueError(f"task={config.task!r}; {nearest(config.task, TASKS)}")
    task = TASKS[config.task]
    model_fits = isinstance(config.model, task.model_config)
    if not model_fits or not isinstance(config.data, task.data_config):
        raise ValueError(
            f"task={config.task}: {type(config.model).__name__} and "
            f"{type(config.data).__name__} are another task's sections; start from a config of "
            "this task (train.py --list)"
        )
    return task
