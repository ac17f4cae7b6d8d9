"""Extraction: from a text to a pydantic model, checked by construction.

`pip install 'foredraft[structured]' pydantic`, then `python examples/extract.py [MODEL]`. The bundled pair is too
small to read well; its answer has the right form all the same. Give a real model for sense.
"""

import sys
from typing import Literal

from pydantic import BaseModel, Field

from foredraft import LLM, SamplingParams

TEXT = "Hi, this is Ana. We are four and would like a table at a cheap Thai place in Oakland, tonight at seven."


class Reservation(BaseModel):
    name: str = Field(max_length=20)
    city: Literal["Oakland", "Berkeley", "San Francisco"]
    cuisine: Literal["thai", "mexican", "sushi"]
    people: int = Field(ge=1, le=12)


def extract(llm: LLM, text: str) -> Reservation:
    params = SamplingParams(structured=Reservation, max_new_tokens=200)
    result = llm.generate(f"{text}\n\nThe reservation as JSON:\n", params)
    forced = sum(result.from_draft)
    print(f"{len(result.token_ids)} tokens, {forced} of them drafted", file=sys.stderr)
    return Reservation.model_validate_json(result.text)


if __name__ == "__main__":
    print(extract(LLM(*sys.argv[1:2]), TEXT))
