"""How processes are started: several that share work, without a free port of their own, and one that may be harmed."""

import io
import os
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout

import torch

LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"],
    "torchrun": ["torch.distributed.run", "--nproc_per_node=2", "--standalone"],
}


class Forked:
    """A process of its own that works and may be harmed: forked, so that it starts in milliseconds."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                with redirect_stderr(io.StringIO()) as said, redirect_stdout(said):
                    work()
                code = 0
            finally:
                os._exit(code)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """The exit code; minus the signal that killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
