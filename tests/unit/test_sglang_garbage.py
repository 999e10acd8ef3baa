"""What SGLang's processes have imported is left out of collections of garbage, in each by its own way."""

import gc

from ghostvis_cli.sglang.plugin import garbage
from ghostvis_cli.sglang.probe import Probe
from tests.engines.scripted import ScriptedServer


async def test_a_server_is_asked_to_do_it_with_the_key_of_its_management_routes() -> None:
    server = ScriptedServer()
    await server.start()
    probe = Probe(server.url, "key", "admin")
    await probe.freeze()
    await probe.aclose()
    await server.stop()
    assert [(seen.target, seen.headers["authorization"]) for seen in server.posts] == [
        ("/freeze_gc", "Bearer admin")
    ]


def test_a_process_that_takes_requests_in_does_it_itself() -> None:
    assert gc.get_freeze_count() == 0
    try:
        garbage.freeze("whatever SGLang's function", was="called with")
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()
