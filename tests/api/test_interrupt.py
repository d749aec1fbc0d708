"""Jobs that are ended early with the pictures so far, over HTTP."""

from __future__ import annotations

from running_service import LONG, SMALL, Running


def running(server: Running, **fields: object) -> str:
    """A long job whose first step is done."""
    job = server.job({**LONG, **fields})
    while server.get(f"/jobs/{job}").json["progress"].get("stage") != "sample":
        pass
    return job


def test_an_interrupted_job_succeeds_with_its_pictures(server: Running) -> None:
    job = running(server, num_outputs=2)
    assert server.post(f"/jobs/{job}/interrupt", None).json["state"] == "running"
    told = server.until(job, "succeeded")
    assert told["interrupted"] and told["result"]["interrupted"] and len(told["result"]["images"]) == 1
    assert server.get(f"/jobs/{job}/images/0").status == 200
    assert server.post(f"/jobs/{job}/interrupt", None).error["type"] == "ConflictError"
    assert not server.generate().json["interrupted"]


def test_a_skip_goes_on_with_the_next_batch(server: Running) -> None:
    job = running(server, num_outputs=2)
    assert server.post(f"/jobs/{job}/skip", None).status == 200
    while server.get(f"/jobs/{job}").json["progress"].get("image_index") != 1:
        pass
    assert server.post(f"/jobs/{job}/interrupt", None).status == 200
    assert len(server.until(job, "succeeded")["result"]["images"]) == 2


def test_a_job_that_waits_is_not_interrupted(server: Running) -> None:
    first, second = running(server), server.job(SMALL)
    refused = server.post(f"/jobs/{second}/interrupt", None)
    assert refused.status == 409 and "cancel it instead" in refused.error["message"]
    assert server.post(f"/jobs/{first}/interrupt", None).status == 200
    assert not server.until(second, "succeeded")["interrupted"]
    assert server.post("/jobs/none/skip", None).status == 404


def test_a_key_does_not_stand_for_an_interrupted_job(server: Running) -> None:
    answer = server.post("/jobs", LONG, Idempotency_Key="interrupted").json
    server.until(answer["id"], "running")
    server.post(f"/jobs/{answer['id']}/interrupt", None)
    server.until(answer["id"], "succeeded")
    again = server.post("/jobs", LONG, Idempotency_Key="interrupted").json
    assert again["id"] != answer["id"]
    server.ask("DELETE", f"/jobs/{again['id']}")
    server.idle()
