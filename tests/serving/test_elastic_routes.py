"""Operations over HTTP: what is passed on, answered and refused."""

from __future__ import annotations

from elastic_ep.serving.backend import OperationRefused
from tests.serving.conftest import Api


def test_scale_and_drain_are_passed_on(api: Api) -> None:
    answer = api.request("POST", "/scale_elastic_ep", json={"new_ep_size": 6, "operation_id": "grow"})
    assert answer.status_code == 200
    assert answer.json()["operation"] == "ScaleRequested(operation_id='grow', new_ep_size=6, drain='move')"
    answer = api.request("POST", "/elastic/ranks/3/drain", json={"drain": "finish", "wait": False, "operation_id": "d"})
    assert answer.status_code == 202
    assert answer.json()["operation"] == "DrainRequested(operation_id='d', rank=3, drain='finish')"
    assert api.get("/elastic/operations/d").json() == answer.json()
    assert [o["operation_id"] for o in api.get("/elastic/operations").json()["operations"]] == ["grow", "d"]
    assert api.get("/is_scaling_elastic_ep").json() == {"is_scaling_elastic_ep": False, "operation_id": None}


def test_a_drain_needs_no_body(api: Api) -> None:
    assert api.request("POST", "/elastic/ranks/0/drain").json()["drain"] == "move"


def test_refusals(api: Api) -> None:
    assert "new_ep_size must be at least 1, got 0" in api.request("POST", "/scale_elastic_ep", json={"new_ep_size": 0}).text
    assert "new_ep_size is required" in api.request("POST", "/scale_elastic_ep", json={}).text
    for rank in ("two", "-1", "9" * 5000):
        assert api.request("POST", f"/elastic/ranks/{rank}/drain").status_code == 404
    assert api.get("/elastic/operations/none").status_code == 404
    api.backend.refuse = OperationRefused("no member would be left to serve")
    answer = api.request("POST", "/elastic/ranks/0/drain")
    assert (answer.status_code, answer.json()["error"]["message"]) == (409, "no member would be left to serve")
