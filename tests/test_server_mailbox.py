"""From the engine's thread to the event loop: in order, nothing lost, and few wake-ups while tokens come fast."""

import asyncio
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the extra server is not installed")
from models.server.answers import ChatShape, CompletionShape
from models.server.jobs import Delta, Gone, Job, Ping, Written
from models.server.mailbox import EVENT_S, Mailbox
from models.server.responses import to_json
from models.server.stream import event, merged


def delta(choice, *texts, reason=""):
    return Delta(choice, [Written(text, 1, "plain", None) for text in texts], (0, 0, 0), reason)


class Watched(Mailbox):
    """Counts the loop's wake-ups."""

    def __init__(self, deliver):
        super().__init__(deliver)
        self.woken = 0

    def call(self, function, *arguments):
        self.woken += 1
        super().call(function, *arguments)


def sent(pauses, urgent=False):
    """What has been delivered of as many events as there are pauses, after which they come; and the wake-ups."""
    job, found = Job([]), []

    async def run():
        mailbox = Watched(lambda job, event: found.append((event, time.monotonic())))
        mailbox.open()
        put = []

        def write():
            for number, pause in enumerate(pauses):
                time.sleep(pause)
                put.append(time.monotonic())
                mailbox.put(job, number, urgent=urgent)
                mailbox.flush()

        thread = threading.Thread(target=write)
        thread.start()
        while len(found) < len(pauses):
            await asyncio.sleep(0.001)
        thread.join()
        await asyncio.sleep(3 * EVENT_S)
        assert not mailbox._looking  # it does not go on when nothing comes
        return mailbox.woken, [at - since for (_, at), since in zip(found, put, strict=True)]

    woken, waited = asyncio.run(asyncio.wait_for(run(), 60))
    assert [event for event, _ in found] == list(range(len(pauses)))
    return woken, waited


def test_events_that_come_fast_share_few_wake_ups():
    woken, _ = sent([0.002] * 200)
    assert woken < 100


def test_events_that_come_slowly_wake_the_loop():
    woken, _ = sent([3 * EVENT_S] * 8)
    assert woken == 8


def test_urgent_events_do_not_wait():
    """While the loop looks by itself, others are waiting for that."""
    _, usual = sent([0.001] * 100)
    _, urgent = sent([0.001] * 100, urgent=True)
    assert 2 * sorted(urgent)[50] < sorted(usual)[50]


def test_nothing_is_lost_between_two_threads():
    sent([0.0] * 20_000)


def test_what_a_choice_has_got_is_one_event():
    events = [delta(0, "a"), delta(1, "x"), Ping(), delta(0, "b", "c"), delta(1, "y", reason="stop"), Gone()]
    assert merged(events) == [delta(0, "a", "b", "c"), delta(1, "x", "y", reason="stop"), Ping(), Gone()]


@pytest.mark.parametrize("shape", [ChatShape('m\\od"el\u2028', None), CompletionShape('m\\od"el\u2028', None)])
@pytest.mark.parametrize("text", ["a", '"\\\n\x00\x1f\x7f', "é\U0001f600\u2028", "\ud800", "data: \n\n"])
def test_a_joined_frame_is_the_chunk_as_json(shape, text):
    one = delta(3, text)
    start, end = shape.frame(3)
    assert start + to_json(shape.plain_text(one)) + end == event(shape.chunk(one))
    assert shape.plain_text(delta(3, text, reason="stop")) is None
