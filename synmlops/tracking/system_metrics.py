"""CPU, memory, disk, network and GPU while a stage runs, sampled by MLflow's monitors."""

import os
import threading
from collections.abc import Callable
from typing import Any

_DEFAULT_SECONDS = 10.0
_LAST_SAMPLE_SECONDS = 5.0


class SystemMetrics(threading.Thread):
    """Samples the machine every few seconds until it is stopped.

    Parameters
    ----------
    stage : str
        Its metrics are called `system/STAGE/...`, so that stages of one run do not mix.
    first_step : int
        Number of the first sample.
    log : callable
        Takes the values of one sample and its number; gives False once nobody wants more.
    seconds : float, optional
        Between samples; default 10, or what `MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL` says.
    """

    def __init__(
        self,
        stage: str,
        *,
        first_step: int,
        log: Callable[[dict[str, float], int], bool],
        seconds: float | None = None,
    ) -> None:
        super().__init__(name=f"synmlops-system-{stage}", daemon=True)
        given = os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "")
        self._seconds = seconds or (float(given) if given.strip() else _DEFAULT_SECONDS)
        self._prefix = f"system/{stage}/"
        self._step = first_step
        self._log = log
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Take a last sample and end."""
        self._stopped.set()
        if self.ident is not None:
            self.join(_LAST_SAMPLE_SECONDS)

    def run(self) -> None:
        """Sample until stopped; on its own thread."""
        monitors = _monitors()
        while True:
            stopping = self._stopped.wait(self._seconds)
            values: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            named = {self._prefix + name: float(value) for name, value in values.items()}
            wanted = self._log(named, self._step)
            self._step += 1
            if stopping or not wanted:
                return


def _monitors() -> list[Any]:
    """Give MLflow's monitors of what this machine has; the GPU's needs nvidia-ml-py."""
    from synmlops.tracking.store import prepare_mlflow

    prepare_mlflow()
    from mlflow.system_metrics.metrics import cpu_monitor, disk_monitor, gpu_monitor, network_monitor

    always: tuple[Any, ...] = (
        cpu_monitor.CPUMonitor,
        disk_monitor.DiskMonitor,
        network_monitor.NetworkMonitor,
    )
    gpu: Any = gpu_monitor.GPUMonitor
    monitors = [make() for make in always]
    try:
        monitors.append(gpu())
    except (ImportError, RuntimeError):  # no nvidia-ml-py, or no GPU
        return monitors
    return monitors
