"""The service seen by a client before it trains: sessions, identity, capabilities (SVC)."""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import json
import time
import urllib.request
import warnings
from datetime import UTC, datetime, timedelta

import pytest
import tinker
from tinker import types

from tests.e2e.sdk import ADAM, batch, fails_promptly, sample, tokens, train_step


def session_id(client: tinker.ServiceClient) -> str:
    return client.holder.get_session_id()


def search(rest: tinker.RestClient, **filters):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tinker.ExperimentalWarning)
        return rest.search_sessions(types.SessionSearchRequest(**filters)).result()


def test_svc_01_client_constructs_quickly(local_service) -> None:
    began = time.monotonic()
    client = local_service.connect()
    assert session_id(client)
    assert time.monotonic() - began < 10
    client.close("success").result()


def test_svc_02_capabilities(local_service, rest) -> None:
    (model,) = rest.get_server_capabilities().result().supported_models
    assert model.model_name == local_service.model
    assert model.max_context_length == 1024
    assert model.trainable
    assert model.sampleable


def test_svc_03_session_is_readable(local_service, rest) -> None:
    client = local_service.connect(user_metadata={"team": "a"}, display_name="night run")
    session = rest.get_session(session_id(client)).result()
    assert session.user_metadata == {"team": "a"}
    assert session.display_name == "night run"
    assert session.training_run_ids == []
    assert session.sampler_ids == []
    assert session_id(client) in rest.list_sessions(limit=50).result().sessions
    client.close("success").result()


def test_svc_04_session_lists_runs_and_samplers(service_client, new_run, rest) -> None:
    run = new_run(service_client)
    ephemeral = run.save_weights_and_get_sampling_client().result()
    base = service_client.create_sampling_client(base_model=run.get_info().model_name).result()
    session = rest.get_session(session_id(service_client)).result()
    assert session.training_run_ids == [run.model_id]
    assert set(session.sampler_ids) == {
        ephemeral._sampling_session_id,
        base._sampling_session_id,
    }


def test_svc_05_two_clients_two_sessions(local_service, service_client) -> None:
    other = local_service.connect()
    assert session_id(other) != session_id(service_client)
    other.close("success").result()


def test_svc_06_and_20_closed_session_stays_readable_and_refuses_work(
    local_service, new_run, rest
) -> None:
    client = local_service.connect()
    run = new_run(client)
    sampler = run.save_weights_and_get_sampling_client().result()
    train_step(run, batch())
    began = time.monotonic()
    client.close("success").result()
    assert time.monotonic() - began < 15
    assert rest.get_session(session_id_of(run)).result().training_run_ids == [run.model_id]
    assert rest.get_training_run(run.model_id).result().base_model == local_service.model
    fails_promptly(lambda: run.forward(batch(), "cross_entropy").result())
    fails_promptly(lambda: sample(sampler, tokens(4)))


def session_id_of(run: tinker.TrainingClient) -> str:
    return run.model_id.partition(":train:")[0]


def test_svc_07_search_shows_how_a_session_ended(local_service, rest) -> None:
    client = local_service.connect()
    finished = session_id(client)
    client.close("errored", "out of data").result()
    (found,) = search(rest, session_id=finished).sessions
    assert found.status.type == "client_finished"
    assert found.status.reason.type == "errored"
    assert found.status.detail == "out of data"


def test_svc_08_context_manager_closes(local_service, rest) -> None:
    with local_service.connect() as client:
        entered = session_id(client)
    (found,) = search(rest, session_id=entered).sessions
    assert found.status.reason.type == "success"
    broken = local_service.connect()
    entered = session_id(broken)
    with pytest.raises(KeyError), broken:
        raise KeyError("x")
    (found,) = search(rest, session_id=entered).sessions
    assert found.status.reason.type == "errored"


def test_svc_09_search_filters(local_service, rest) -> None:
    one = local_service.connect(display_name="Nightly Math run", user_metadata={"k": "svc09"})
    two = local_service.connect(display_name="nightly code run", user_metadata={"k": "svc09"})
    ids = [session_id(one), session_id(two)]
    two.close("success").result()

    def found(**filters) -> list[str]:
        return [
            item.session_id for item in search(rest, **filters).sessions if item.session_id in ids
        ]

    assert found(display_name="MATH nightly") == [ids[0]]
    assert found(display_name="nightly", user_metadata={"k": "svc09"}) == ids[::-1]
    assert found(user_metadata={"k": "other"}) == []
    assert found(session_id=ids[0]) == [ids[0]]
    assert found(session_id=ids[0], display_name="code") == ids[::-1], "either one matches"
    finished = types.session_status_query.ClientFinishedSessionStatusQuery
    active = types.session_status_query.ActiveSessionStatusQuery
    assert found(statuses=[active()]) == [ids[0]]
    assert found(statuses=[finished(reasons=["success"])]) == [ids[1]]
    assert found(statuses=[finished(reasons=["errored"])]) == []
    assert found(owner=types.AccessibleSearchOwner()) == ids[::-1]
    assert found(owner=types.UserSearchOwner(owner_urns=["tml:user:somebody"])) == []
    one.close("success").result()


def test_svc_10_search_pages(local_service, rest) -> None:
    clients = [local_service.connect(user_metadata={"k": "svc10"}) for _ in range(5)]
    expected = [session_id(client) for client in clients][::-1]
    seen, cursor = [], None
    for _ in range(3):
        page = search(rest, user_metadata={"k": "svc10"}, limit=2, cursor=cursor)
        seen += [item.session_id for item in page.sessions]
        cursor = page.next_cursor
    assert cursor is None
    assert seen == expected
    for client in clients:
        client.close("success").result()


def test_svc_11_list_sessions_pages(local_service, rest) -> None:
    clients = [local_service.connect() for _ in range(3)]
    newest = [session_id(client) for client in clients][::-1]
    assert rest.list_sessions(limit=3).result().sessions == newest
    assert rest.list_sessions(limit=2, offset=1).result().sessions == newest[1:]
    for client in clients:
        client.close("success").result()


def test_svc_12_whoami(rest) -> None:
    me = rest.whoami().result()
    assert me.user_urn == "tml:user:local"
    assert me.org_urn == "tml:organization:local"


def test_svc_13_accessibility_check(local_service, monkeypatch) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", local_service.base_url)
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    tinker.auth.raise_if_tinker_not_accessible()
    monkeypatch.setenv("TINKER_API_KEY", "tml-wrong-key-000000000000")
    with pytest.raises(tinker.AuthenticationError, match="X-API-Key"):
        tinker.auth.raise_if_tinker_not_accessible()


@pytest.mark.slow
def test_svc_14_heartbeats(local_service, service_client, new_run) -> None:
    run = new_run(service_client)
    time.sleep(12)
    assert "session_heartbeat 200" in local_service.log()
    train_step(run, batch())


def test_svc_15_projects(local_service, rest) -> None:
    client = local_service.connect(project_id="alpha")
    mine = session_id(client)
    (found,) = search(rest, session_id=mine).sessions
    assert found.project_id == "alpha"
    rest.assign_session_project(mine, "beta").result()
    assert mine in [item.session_id for item in search(rest, project_ids=["beta"]).sessions]
    assert mine not in [item.session_id for item in search(rest, project_ids=["alpha"]).sessions]
    client.close("success").result()


def test_svc_16_unknown_session(rest) -> None:
    with pytest.raises(tinker.NotFoundError, match="nowhere"):
        rest.get_session("nowhere").result()


def test_svc_17_addresses_keys_headers(local_service) -> None:
    client = tinker.ServiceClient(
        base_url=local_service.base_url + "/",
        api_key=local_service.api_key,
        default_headers_overrides={"X-Extra": "1"},
    )
    assert session_id(client)
    client.close("success").result()


def test_svc_18_billing_and_audit_are_empty(local_service) -> None:
    admin = tinker.AdminClient(base_url=local_service.base_url, api_key=local_service.api_key)
    now = datetime.now(UTC)
    usage = admin.get_billing_usage(starting_on=now - timedelta(days=1), ending_before=now).result()
    assert usage.data == []
    assert admin.get_current_checkpoint_storage_usage().result().data == []
    assert admin.get_audit_log(event_type="checkpoints").result().entries == []


def test_svc_19_trace_export(service_client, new_run, rest) -> None:
    run = new_run(service_client)
    train_step(run, batch())
    url = rest.export_session_trace(session_id(service_client)).result()
    with urllib.request.urlopen(url) as response:
        trace = json.load(response)
    names = [event["name"] for event in trace["traceEvents"] if event["ph"] == "X"]
    assert names == ["create_model", "forward_backward", "optim_step"]


def test_svc_21_a_dozen_runs(new_run, service_client) -> None:
    runs = [new_run(service_client, seed=number) for number in range(12)]
    steps = [(run.forward_backward(batch(), "cross_entropy"), run.optim_step(ADAM)) for run in runs]
    for computed, stepped in steps:
        assert computed.result().metrics["loss:sum"] > 0
        stepped.result()


def test_svc_22_samplers(base_sampler, local_service, rest) -> None:
    found = rest.get_sampler(base_sampler._sampling_session_id).result()
    assert found.base_model == local_service.model
    assert found.model_path is None
    with pytest.raises(tinker.NotFoundError, match="unknown"):
        rest.get_sampler("unknown").result()
