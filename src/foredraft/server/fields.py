"""What all request bodies have in common: strictness, and the kinds of fields."""

import re
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

UID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


def check_uid(uid: str) -> str:
    """Raises ValueError where this cannot name a model."""
    if not re.fullmatch(UID, uid):
        form = "1 to 100 letters, digits, dots, dashes and underscores, the first a letter or a digit"
        raise ValueError(f"{uid!r:.120} is not usable; give {form}")
    return uid


Uid = Annotated[str, AfterValidator(check_uid), Field(json_schema_extra={"pattern": UID})]
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Stop = Annotated[str, Field(min_length=1)]
FEW = 5  # fields that an error about an object lists
Text = Annotated[str, Field(max_length=50_000_000)]  # the body's own limit is lower


class Body(BaseModel):
    """Strict: a number in quotes is no number, and of a field that nobody knows it is told which one may be meant."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _knows_all(cls, body: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        if not isinstance(body, dict | cls):
            names = f" with {' or '.join(known)}" if len(known) <= FEW else ""
            raise PydanticCustomError("object_type", "it must be an object{names}", {"names": names})
        for name in body if isinstance(body, dict) else ():
            if name not in known:
                shown = str(name)[:100].encode("utf-8", "backslashreplace").decode()
                near = get_close_matches(shown, known, n=1)
                advice = f"did you mean {near[0]!r}?" if near else "leave it out"
                message = "there is no such field here, and none is ignored; {advice}"
                raise PydanticCustomError("field", message, {"name": shown, "advice": advice})
        return body


class Asked(Body):
    """A whole body."""
