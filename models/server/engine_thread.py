"""The one thread that touches the models: it loads them, and takes the engine's steps as long as there are texts."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from loguru import logger

from models.errors import NotFinite, UserError
from models.server.audits import Audits
from models.server.drafting import Draftings
from models.server.errors import ApiError, internal, refused, unavailable
from models.server.jobs import Accepted, Delta, Event, Gone, Job, clock
from models.server.mailbox import EVENT_S, Mailbox
from models.server.metrics import Metrics
from models.server.scores import Scorer
from models.server.texts import Text

if TYPE_CHECKING:
    from models.llm import LLM
    from models.speculative.engine import Emission, Engine
    from models.speculative.sequence import Sequence

WARM_UP = ("Hello", 8)  # prompt, tokens
FAILURES = 3  # steps in a row that raise, before the server calls itself unhealthy


class EngineThread:
    """Runs an engine for an event loop.

    Jobs come by `submit`, from the event loop's thread, and get their events back there. At most `capacity` choices are
    under way or wait.

    Args:
        load: makes the models, in this thread.
        metrics: told what happens.
        queued: choices that may wait beside those that have a slot.
        failed: called in the event loop's thread where loading has failed.
        audit_every: one in so many texts is replayed while there is nothing else to do; None: none.
    """

    def __init__(
        self,
        load: Callable[[], LLM],
        metrics: Metrics,
        queued: int,
        failed: Callable[[Exception], None],
        audit_every: int | None = None,
    ) -> None:
        self.state = "loading"  # then "ready", "draining", or "failing" after steps that raised
        self.llm: LLM | None = None
        self.chats = False  # whether there is a chat template
        self.drafters: tuple[str, ...] = ()  # that requests may ask for
        self.capacity = self.slots = 0
        self.open = 0  # choices that are under way or wait
        self._load, self._metrics, self._queued, self._failed = load, metrics, queued, failed
        self._audit_every = audit_every
        self._audits: Audits | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._texts: dict[Sequence, Text] = {}
        self._mailbox = Mailbox(self._deliver)
        self._stopped, self._raised = False, 0
        self._deadline = math.inf
        self._observed = 0.0  # when metrics were told what is under way
        self._request_s = 0.0  # seconds that a text takes, roughly
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ----------------------------------------------------------------------------- called in the event loop's thread
    def start(self) -> None:
        """Begin to load."""
        self._mailbox.open()
        self._thread.start()

    def check_ready(self) -> LLM:
        """The models. Raises ApiError while there are none, and when no more requests are taken."""
        if self.llm is None:
            raise unavailable("the models are being loaded", "loading", 5)
        if self.state == "draining":
            raise unavailable("the server is shutting down", "draining", 10)
        return self.llm

    def submit(self, job: Job) -> None:
        """Take a job. Raises ApiError where it cannot wait."""
        self.check_ready()
        count = len(job.choices)
        if count > self.capacity:
            message = f"{count} choices: this server takes at most {self.capacity} at once: ask for fewer"
            raise ApiError(400, message, param="n", code="invalid_value")
        if self.open + count > self.capacity:
            retry_s = min(max(1, math.ceil(self._request_s * (self.open + count) / self.slots)), 60)
            message = f"{self.open} texts are under way or wait, more cannot: try again in {retry_s} s"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(retry_s)})
        job.open = count
        self.open += count
        self._commands.put(lambda: self._begin(job))

    def cancel(self, job: Job) -> None:
        """The client has gone: its slots are free after the step under way."""
        if job.open and not job.cancelled:
            job.cancelled = True
            job.events.put_nowait(Gone())
            self._commands.put(lambda: self._end(job, None))

    def drain(self, seconds: float) -> None:
        """Finish what is under way within so many seconds, and take nothing new."""
        if self.state != "draining":
            self.state = "draining"
            deadline = clock() + seconds
            self._commands.put(lambda: setattr(self, "_deadline", deadline))

    def stop(self) -> None:
        """End the thread, and wait for it unless it is still loading."""
        self._commands.put(lambda: setattr(self, "_stopped", True))
        if self.llm is not None:
            self._thread.join()

    def _deliver(self, job: Job, event: Event) -> None:
        if isinstance(event, Gone):  # all choices of a job that was cancelled or refused
            self._close(job, job.open)
            return
        if isinstance(event, Delta) and event.summary:
            self._close(job, 1)
            self._request_s += 0.2 * (clock() - job.arrived - self._request_s)
        if not job.cancelled:
            job.events.put_nowait(event)

    def _close(self, job: Job, count: int) -> None:
        job.open -= count
        self.open -= count

    def _ready(self, llm: LLM) -> None:
        self.chats = llm.tokenizer is not None and llm.tokenizer.has_chat_template
        self.slots = llm.engine.target.limits.slots
        self.capacity = self.slots + self._queued
        self.llm = llm
        if self.state == "loading":
            self.state = "ready"

    def _health(self, state: str) -> None:
        if self.state in ("ready", "failing"):
            self.state = state

    # ------------------------------------------------------------------------------------------ the engine's thread
    def _run(self) -> None:
        try:
            llm = self._load()
            self._engine: Engine = llm.engine
            self._llm = llm
            self._draftings = Draftings(llm, self._lost_drafter)
            self._warm_up()
            if self._audit_every is not None:
                self._audits = Audits(llm, self._audit_every, self._metrics)
            self.drafters = self._draftings.names
        except Exception as error:
            self._mailbox.call(self._failed, error)
            return
        self._mailbox.call(self._ready, llm)
        with torch.inference_mode(), llm:
            while self._take_commands():
                self._step()

    def _take_commands(self) -> bool:
        """Do what was asked for; replay texts, or wait, where there is nothing else to do. False: the thread ends."""
        while not self._stopped:
            if not self._commands.empty():
                self._commands.get()()
            elif self._texts:
                break
            else:
                self._flush()
                idle_s = self._audits.step() if self._audits else None
                if idle_s != 0:
                    self._wait(idle_s)
        return not self._stopped

    def _wait(self, seconds: float | None) -> None:
        """For a command, which is done; None: as long as it takes."""
        try:
            command = self._commands.get(timeout=seconds)
        except queue.Empty:
            return
        command()

    def _begin(self, job: Job) -> None:
        if job.cancelled:
            self._mailbox.put(job, Gone())
            return
        if self._audits:
            self._audits.give_way()
        try:
            drafting = self._draftings.of(*job.speculation)
        except UserError as error:
            self._end(job, refused(error, "speculation"))
            return
        try:
            for choice in job.choices:
                scorer = None if job.top_logprobs is None else Scorer(job.top_logprobs)
                request, text = self._llm.request(
                    choice.prompt,
                    choice.sampling,
                    max_new_tokens=choice.max_new_tokens,
                    stop=choice.stop,
                    stop_ids=choice.stop_ids,
                    speculate=drafting,
                    reader=scorer,
                )
                sequence = self._engine.add(request)
                self._texts[sequence] = Text(job, choice, text, scorer, drafting)
        except Exception as error:
            self._end(job, self._told(error))
            return
        self._metrics.prompt_tokens += job.prompt_tokens
        self._mailbox.put(job, Accepted())

    def _step(self) -> None:
        if clock() > self._deadline:
            for job in {text.job for text in self._texts.values()}:
                self._end(job, unavailable("the server is shutting down", "draining", 10))
        try:
            emissions = self._engine.step()
            failing = False
        except Exception as error:  # the engine itself: nobody knows what its texts are worth
            logger.exception("a step of the engine failed: the texts under way are given up")
            failing, emissions = True, []
            given_up = self._engine.running or list(self._texts)[:1]
            for job in {text.job for sequence, text in self._texts.items() if sequence in given_up}:
                self._end(job, self._told(error))
        if failing or self._raised:
            self._raised = self._raised + 1 if failing else 0
            self._mailbox.call(lambda: self._health("failing" if self._raised >= FAILURES else "ready"))
        now = clock()
        for emission in emissions:
            if (text := self._texts.get(emission.sequence)) is not None:
                self._emitted(text, emission, now)
        self._flush()

    def _emitted(self, text: Text, emission: Emission, now: float) -> None:
        sequence, job, metrics = emission.sequence, text.job, self._metrics
        if sequence.error is not None:
            self._end(job, self._told(sequence.error))
            return
        before, first = text.last, not text.first
        count = text.take(emission, now)
        metrics.generation_tokens += count
        if first:
            metrics.first_token.observe(now - job.arrived)
        elif count:
            metrics.between_tokens.observe((now - before) / count)
        for round_ in sequence.stats.rounds[text.rounds :]:
            metrics.round(round_)
            text.rounds += 1
            text.drafted += round_.drafted
            text.accepted += round_.accepted
        if (delta := text.delta(sequence)) is not None:
            self._mailbox.put(job, delta, urgent=first or delta.summary is not None)
            if delta.summary:
                del self._texts[sequence]
                metrics.whole.observe(now - job.arrived)
                metrics.ended(delta.finish_reason)
                if self._audits:
                    self._audits.ended(job.name, text.choice, text.drafting.name, sequence)

    def _end(self, job: Job, error: ApiError | None) -> None:
        """Give up all texts of a job. error: what its client is told; None: it has gone."""
        for sequence in [sequence for sequence, text in self._texts.items() if text.job is job]:
            del self._texts[sequence]
            self._engine.abort(sequence)
            self._metrics.ended("abort")
        if error is not None:
            self._mailbox.put(job, error)
        self._mailbox.put(job, Gone())

    def _flush(self) -> None:
        now = clock()
        if not self._texts or now - self._observed > EVENT_S:
            self._observed = now
            self._metrics.observe(self._engine)
        self._mailbox.flush()

    def _told(self, error: Exception) -> ApiError:
        """What a client is told of an error that its own request has met."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, UserError) and not isinstance(error, NotFinite):
            return refused(error)
        logger.opt(exception=error).error("a request failed")
        return internal()

    def _lost_drafter(self, error: Exception) -> None:
        self._metrics.degraded += 1
        logger.opt(exception=error).warning("a drafter failed: its text is decoded plainly from here on")

    def _warm_up(self) -> None:
        """Write a few tokens, so that costs, an exit layer, and the chat template are there for the first client."""
        llm = self._llm
        text, tokens = WARM_UP
        prompt = [0] if llm.tokenizer is None else llm.encode(text) or [0]
        if llm.tokenizer is not None and llm.tokenizer.has_chat_template:
            llm.tokenizer.chat(text)
        tokens = min(tokens, llm.engine.target.limits.positions - len(prompt))
        for drafting in (self._draftings.of("none", None), self._draftings.default):
            with torch.inference_mode():
                llm.generate(prompt, max_new_tokens=tokens, speculate=drafting)
