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
    """Raises ValueError for an unknown name, or sections that are not this task's."""
    if config.task not in TASKS:
        raise ValueError(f"task={config.task!r}; {nearest(config.task, TASKS)}")
    task = TASKS[config.task]
    if not isinstance(config.model, task.model_config) or not isinstance(
        config.data, task.data_config
    ):
        raise ValueError(
            f"task={config.task}: a {type(config.model).__name__} and a {type(config.data).__name__} are another "
            f"task's; start from a config of that task (train.py --list)"
        )
    return task
