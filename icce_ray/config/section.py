"""The base of all sections of the config, and the types of their settings."""

import re
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
PositiveInt = Annotated[int, Field(ge=1)]
AtLeastTwo = Annotated[int, Field(ge=2)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
MAX_PATH_CHARACTERS = 4096


def is_utf8(text: str) -> bool:
    """Whether text can be written as UTF-8: it holds no half of a character, as bytes of another encoding do when they
    are read with `surrogateescape`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_place(place: str) -> str:
    """Refuse paths and URIs that cannot be meant as they are written."""
    if not place.strip():
        raise ValueError("it is empty")
    if "\0" in place:
        raise ValueError("it holds a NUL character")
    if not is_utf8(place):
        raise ValueError("it is not valid UTF-8; rename it, or lead to it by a link")
    if len(place) > MAX_PATH_CHARACTERS:
        raise ValueError(f"it is {len(place):,} characters long; at most {MAX_PATH_CHARACTERS:,} are possible")
    if place.startswith(("~", "$")):
        raise ValueError("~ and variables are not expanded; write the whole path")
    if re.match(r"\w[\w+.-]*://[^/]*@", place):
        raise ValueError(
            "it holds credentials, which manifests would repeat; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "storage.access_key and storage.secret_key"
        )
    return place


Place = Annotated[str, AfterValidator(_check_place)]
"""A local path or a URI."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _nothing_below(cls, data: Any) -> Any:
        """A section whose settings are all commented out is null to YAML."""
        return {} if data is None else data

    @field_validator("*", mode="before")
    @classmethod
    def _bool_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes false for 0 otherwise, and a threshold that is meant to be off becomes 0."""
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and field.annotation is not bool:
            remedy = "; write null to switch it off" if type(None) in get_args(field.annotation) and not value else ""
            raise ValueError(f"true and false are not allowed here{remedy}")
        return value
