"""What SDK calls return in old and new versions is used in one way."""

import asyncio
import concurrent.futures

import pytest

from tinker_cookbook.utils import sdk_compat, sdk_futures


class NewClient:
    async def sample(self, value: int) -> int:
        return value + 1


class WrapperWithAsyncName:
    """Forwards unknown names to a client inside, as wrappers of programs do."""

    def __init__(self) -> None:
        self.inner = NewClient()

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    async def sample_async(self, value: int) -> int:
        return value + 10


@pytest.mark.parametrize(("client", "result"), [(NewClient(), 2), (WrapperWithAsyncName(), 11)])
def test_a_method_is_called_by_the_name_that_the_client_defines(client: object, result: int):
    async def run() -> int:
        return await sdk_compat.call(client, "sample", 1)

    assert asyncio.run(run()) == result


def test_a_client_without_the_method_is_named():
    with pytest.raises(AttributeError, match=r"object has neither sample nor sample_async"):
        sdk_compat.call(object(), "sample")


def test_a_future_of_a_thread_can_be_awaited():
    async def run() -> str:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return await sdk_compat.awaitable(pool.submit(lambda: "done"))

    assert asyncio.run(run()) == "done"


def test_a_client_is_returned_by_old_and_new_create_functions():
    async def later(client: str) -> str:
        return client

    assert asyncio.run(sdk_compat.create_client(str, "old")) == "old"
    assert asyncio.run(sdk_compat.create_client(lambda name: later(name), "new")) == "new"


def test_copied_recipes_find_the_names_under_the_earlier_module():
    assert sdk_futures.wait_for_client is sdk_compat.wait_for_client
