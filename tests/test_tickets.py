"""Tickets of launches (csrc/cuda/tickets.cu) on the stub of CUDA's runtime, whose streams a test can call captured: no two
launches that may run at the same time share one, however many there are."""

import ctypes
import threading
from pathlib import Path

import pytest
from simt import build as simt_build
from simt.build import Simt, build

pytestmark = pytest.mark.skipif(simt_build.why_not() is not None, reason=str(simt_build.why_not()))

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
LEGACY, LEGACY_BY_NAME, PER_THREAD = 0, 1, 2  # NULL, cudaStreamLegacy, cudaStreamPerThread
UNSUPPORTED, IMPLICIT = 900, 906  # cudaErrorStreamCaptureUnsupported, cudaErrorStreamCaptureImplicit
CAPTURED = 64  # a stream


@pytest.fixture(scope="module")
def simt(tmp_path_factory):
    out = tmp_path_factory.mktemp("tickets") / "tickets.so"
    shim = [TESTS / "cuda_on_cpu" / "tickets.cpp"]
    simt = Simt(build([CSRC / "cuda" / "tickets.cu"], out, "plain", include_dirs=[CSRC], extra_sources=shim))
    simt.library.ticket_for.argtypes = [ctypes.c_void_p]
    simt.library.ticket_for.restype = ctypes.c_void_p
    return simt


@pytest.fixture
def ticket(simt):
    """stream -> the address of its ticket, which is zero and aligned."""

    def ticket(stream):
        address = simt.library.ticket_for(stream)
        assert address and address % 4 == 0 and ctypes.c_uint.from_address(address).value == 0
        return address

    yield ticket
    assert simt.library.last_error() == 0


def in_a_thread(*work):
    """What each function returns in a thread of its own, while all the threads are there."""
    results, together = [None] * len(work), threading.Barrier(len(work))

    def run(j):
        together.wait()
        results[j] = work[j]()
        together.wait()

    threads = [threading.Thread(target=run, args=(j,)) for j in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_every_stream_keeps_a_ticket_of_its_own(ticket):
    """10000: more than two pools hold."""
    streams = [LEGACY, *range(100, 80_100, 8)]
    first = [ticket(stream) for stream in streams]
    assert len(set(first)) == len(streams) == 10_001
    assert [ticket(stream) for stream in streams] == first
    assert in_a_thread(lambda: [ticket(stream) for stream in streams]) == [first]
    assert ticket(LEGACY_BY_NAME) == ticket(LEGACY)


def test_every_captured_launch_has_a_ticket_of_its_own(simt, ticket):
    """20000 of two streams, which are captured at the same time; pools grow meanwhile."""
    streams = [ticket(stream) for stream in (CAPTURED, 72, LEGACY, 80)]
    with simt.captured(CAPTURED), simt.captured(72):
        captured = [ticket(CAPTURED + 8 * (j % 2)) for j in range(20_000)]
        other = [ticket(stream) for stream in range(1_000_000, 1_080_000, 8)]
    after = [ticket(stream) for stream in (CAPTURED, 72, LEGACY, 80)]
    assert after == streams
    assert len({*captured, *other, *streams}) == 20_000 + 10_000 + 4


def test_streams_of_threads(ticket):
    """cudaStreamPerThread is another stream in every thread, of those that run together and of those that follow."""
    together = in_a_thread(*[lambda: (ticket(PER_THREAD), ticket(PER_THREAD), ticket(88))] * 8)
    assert all(first == again for first, again, _ in together)
    assert len({shared for *_, shared in together}) == 1
    later = [in_a_thread(lambda: ticket(PER_THREAD))[0] for _ in range(8)]
    own = ticket(PER_THREAD)
    assert len({*(first for first, *_ in together), *later, own, ticket(LEGACY), ticket(88)}) == 8 + 8 + 3


def test_streams_of_devices(simt, ticket):
    """The default streams have the same handles everywhere."""
    tickets = {}
    for device in (0, 1, 0, 1):
        assert simt.library.set_device(device) == 0
        for stream in (LEGACY, PER_THREAD, 96):
            tickets.setdefault((device, stream), set()).add(ticket(stream))
    simt.library.set_device(0)
    assert all(len(own) == 1 for own in tickets.values()) and len(set.union(*tickets.values())) == 6


def test_threads_that_ask_at_the_same_time(ticket):
    streams = range(2_000_000, 2_040_000, 8)
    first, *others = in_a_thread(*[lambda: [ticket(stream) for stream in streams]] * 4)
    assert all(other == first for other in others) and len(set(first)) == len(streams)


def test_the_capture_of_another_stream_leaves_the_thread_as_it_was(simt, ticket):
    with simt.captured(CAPTURED):
        for _ in range(5000):
            ticket(CAPTURED)
        assert simt.library.zeros(False, -1, True) == -1 and simt.library.last_error() == UNSUPPORTED
    assert simt.library.zeros(False, -1, True) == 1


def test_the_legacy_stream_of_a_capture_that_may_wait_for_it_is_an_error(simt):
    with simt.captured(CAPTURED):
        assert simt.library.ticket_for(LEGACY) is None and simt.library.last_error() == IMPLICIT


@pytest.mark.parametrize(
    "way, found",
    [
        (dict(relaxed=True, on=-1, waits=True), 1),
        (dict(relaxed=False, on=-1, waits=True), -1),  # memory in global mode
        (dict(relaxed=True, on=LEGACY, waits=False), -1),
        (dict(relaxed=True, on=CAPTURED, waits=False), 0),  # recorded, not done
        (dict(relaxed=True, on=CAPTURED, waits=True), -1),
        (dict(relaxed=True, on=-1, waits=False), 0),  # not done yet
    ],
    ids=lambda x: " ".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else None,
)
def test_the_stub_catches_each_wrong_way(simt, way, found):
    with simt.captured(CAPTURED):
        assert simt.library.zeros(*way.values()) == found
    simt.library.last_error()
