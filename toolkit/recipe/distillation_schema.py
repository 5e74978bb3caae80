"""The table [distillation]: soft targets of a trained model, the teacher."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from toolkit.recipe.base import ConfigModel


class PretrainedTeacher(ConfigModel):
    """A pretrained model that is the teacher, with its own last layer."""

    source: Literal["torchvision", "timm"] = Field(description="Library of the model.")
    name: str = Field(min_length=1, description="Architecture.")
    weights: str = Field(
        "DEFAULT", min_length=1, description="Weights, as in model.weights: a name, or file:PATH for a file."
    )
    args: dict[str, Any] = Field({}, description="Arguments of the architecture, as in model.args.")


class DistillationConfig(ConfigModel):
    """Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531) from a trained teacher."""

    teacher: Annotated[str, Field(min_length=1)] | PretrainedTeacher = Field(
        description="A run directory, a folder written by `toolkit export --format safetensors`, or a table that names "
        "a pretrained model, whose outputs must be the data set's classes in this order."
    )
    alpha: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Weight of the soft targets: the loss is (1 - alpha) x train.loss + alpha x temperature^2 x "
        "KL(teacher || student), where both distributions are softened by the temperature.",
    )
    temperature: float = Field(
        4.0, gt=0, le=1000, description="Divisor of the logits of teacher and student in the loss by the soft targets."
    )
