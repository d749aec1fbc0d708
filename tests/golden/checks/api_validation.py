"""Bodies that the models take, with the fields that are set then, and those that they refuse, with place and type."""

from __future__ import annotations

from goldens import Case
from pydantic import ValidationError

from checks.api_models import MODELS


def check(case: Case) -> None:
    model = MODELS[case["model"]]
    try:
        parsed = model.model_validate(case["body"])
    except ValidationError as error:
        assert not case["ok"], str(error)
        refused = [[list(row["loc"]), row["type"]] for row in error.errors()]
        assert sorted(refused, key=repr) == sorted(case["errors"], key=repr)
        return
    assert case["ok"]
    assert sorted(parsed.model_fields_set) == sorted(case["set"])
