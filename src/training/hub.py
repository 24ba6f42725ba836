"""A run on the Hugging Face hub: its weights are pushed while it trains, with a card that says what they are."""

from pathlib import Path

from ..config import quoted
from ..report.card import push_run
from ..runs.folders import finished
from ..runtime.checkpoint import newest
from ..storage.hub import HubConfig, make_repo
from .background import Background


class HubPushes(Background):
    """A thread that pushes the EMA weights of a run to the hub: those of its final folder when it has finished, and where the
    config says so, those of each checkpoint. The repository is made at the start, so that a wrong token is said then."""

    starts_at_once, last_attempts = True, 3
    failing, works = "not pushed to the hub", "pushes to the hub work again"

    def __init__(self, cfg: HubConfig, run_dir: Path) -> None:
        self._cfg, self._address, self._has_repo = cfg, None, False
        super().__init__(run_dir, f"{cfg.name} on the hub")

    def _put(self, step: str | None, back: bool) -> None:
        cfg, checkpoints = self._cfg, self._run_dir / "checkpoints"
        if not self._has_repo:
            make_repo(cfg.name, private=cfg.private)
            self._has_repo = True
        weights = finished(self._run_dir, newest(checkpoints)[0]) if self._is_last else None
        if weights is None and step is not None and cfg.every == "checkpoint":
            weights = checkpoints / step
        if weights is not None and weights.exists():  # else the run went back behind it meanwhile
            self._address = push_run(weights, cfg.name, private=cfg.private, shown=False).address

    def _last_line(self, failed: str | None) -> str | None:
        if failed is None:
            return f"{self._run_dir} is at {self._address}" if self._address is not None else None
        later = f"python convert.py push {quoted(self._run_dir)} {quoted(self._cfg.name)}"
        return f"{self._run_dir} is NOT at {self.where} as it is here ({failed}); later: {later}"
