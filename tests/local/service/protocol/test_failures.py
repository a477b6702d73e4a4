"""Errors become HTTP answers in one place: statuses, headers and messages."""

import json

import pytest

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.local import errors
from tinker_cookbook.local.service.protocol.failures import describe_failure, render_failure


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.UserError("x=1 is wrong"), 400),
        (errors.UnauthorizedError("no key"), 401),
        (errors.ForbiddenError("old link"), 403),
        (errors.NotFoundError("x=1 does not exist"), 404),
        (errors.BodyTimeoutError("too slow"), 408),
        (errors.GoneError("no longer kept"), 410),
        (errors.TooLargeError("too long"), 413),
        (errors.ShuttingDownError("stopping"), 503),
        (errors.StorageError("/disk is full"), 400),
        (ConfigurationError("bad setting"), 400),
    ],
)
def test_expected_errors_keep_their_message(error: Exception, status: int) -> None:
    failure = describe_failure(error, "id-1")
    assert (failure.status, failure.detail, failure.is_unexpected) == (status, str(error), False)
    answer = render_failure(failure)
    assert json.loads(bytes(answer.body)) == {"detail": str(error)}
    assert ("retry-after" in answer.headers) == (status == 503)
    assert ("www-authenticate" in answer.headers) == (status == 401)


def test_other_errors_are_500_with_type_and_request_id() -> None:
    failure = describe_failure(KeyError("x"), "id-1")
    assert failure.is_unexpected
    assert failure.detail == "KeyError: 'x' (request id-1)"
