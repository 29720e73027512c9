"""A budget of KV pages in which a prompt that runs in parts has had all its pages since it was admitted.

The core reserves pages as tokens run. Schedulers whose source allocates the whole prompt at admission count
the pages of what is left of it as taken, in every plan. Pools with a window let go of what came before: of
these a prompt takes no more than its window and one step need.
"""

from __future__ import annotations

from servelab.core.api import RequestView, StepView


class PromptBudget:
    """Scratch account for one plan, over ``view.kv.budget()``.

    Args:
        view: of this call.
        watermark: share of each pool that admissions leave free while anybody runs; so does what the kvcache
            asks for.
        step: tokens of one prompt that a step runs at most.
    """

    def __init__(self, view: StepView, watermark: float, step: int) -> None:
        kv = self._kv = view.kv
        self._pages = kv.budget()
        self._step = step
        self._keep = tuple(int(watermark * pages) for pages in kv.total_pages)
        self._promised = [0] * len(self._keep)
        self._promises: dict[str, list[int]] = {}
        self._windows = kv.window_tokens if any(kv.window_tokens) else ()

    @property
    def free(self) -> tuple[int, ...]:
        """Pages left, per pool."""
        return tuple(a - b for a, b in zip(self._pages.free, self._promised, strict=True))

    def promise(self, request: RequestView) -> None:
        """What is left of its prompt has its pages already: they are nobody else's."""
        if request.pending_tokens > request.slack_tokens:
            self._promise(request, self._whole(request))

    def _promise(self, request: RequestView, pages: list[int]) -> None:
        self._promises[request.id] = pages
        self._promised = [a + b for a, b in zip(self._promised, pages, strict=True)]

    def _withdraw(self, request: RequestView) -> list[int] | None:
        pages = self._promises.pop(request.id, None)
        if pages is not None:
            self._promised = [a - b for a, b in zip(self._promised, pages, strict=True)]
        return pages

    def take(self, request: RequestView, n: int) -> bool:
        """Set aside what ``n`` more tokens of a running request need, out of its promise if it has one."""
        if n <= request.slack_tokens:
            return True
        own = self._withdraw(request) if self._promises else None
        if own is None and self._promises and not self._beside(self._kv.pages_needed(request, n)):
            return False
        before = self._pages.free if own is not None else ()
        if not self._pages.take(request, n):
            return False
        if own is not None:  # the rest of the promise stands
            taken = zip(own, before, self._pages.free, strict=True)
            self._promise(request, [max(0, pages - (a - b)) for pages, a, b in taken])
        return True

    def admit(self, request: RequestView, n: int, *, busy: bool) -> bool:
        """Set aside its whole prompt, of which ``n`` tokens run now; False (and nothing) if it does not fit.

        Args:
            busy: somebody runs, so that the watermark holds: else nothing would ever free what it waits for.
        """
        whole = self._whole(request)
        if not self._beside(whole, self._keep if busy else ()):
            return False
        before = self._pages.free
        if not self._pages.take(request, n):
            return False
        taken = zip(whole, before, self._pages.free, strict=True)
        self._promise(request, [max(0, pages - (a - b)) for pages, a, b in taken])
        return True

    def forget(self, request: RequestView) -> None:
        """It runs no more: what is left of its prompt needs no pages now."""
        self._withdraw(request)

    def give_back(self, request: RequestView) -> None:
        """Count what recomputing the request later frees at once, its promise too."""
        self.forget(request)
        self._pages.give_back(request)

    def _beside(self, need: tuple[int, ...] | list[int], keep: tuple[int, ...] = ()) -> bool:
        free = zip(need, self._pages.free, self._promised, keep or (0,) * len(need), strict=True)
        return all(pages + promised + left <= have for pages, have, promised, left in free)

    def _whole(self, request: RequestView) -> list[int]:
        """Further pages, per pool, for all that is pending of the request, run in steps."""
        need = list(self._kv.pages_needed(request, request.pending_tokens))
        for i, window in enumerate(self._windows):
            if window is not None:
                page = self._kv.page_tokens[i]
                most = -(-(window + self._step + page - 2) // page)  # as Pool.most_tokens counts
                need[i] = min(need[i], max(0, most - request.pages[i]))
        return need
