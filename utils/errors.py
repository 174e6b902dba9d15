"""What a command prints when it fails, and its exit status: one line, no traceback, for whatever a user did.

    sys.exit(exit_status("train.py", main))

0 done; 1 the work failed after it had begun; 2 wrong arguments or unusable input; 128 + n ended by signal n. An
unexpected exception is one line, too, with its place in the code; python -X dev shows the traceback.
"""

import contextlib
import logging
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from utils import checkpoints, devices, distributed

LONGEST = 1000  # characters of a message


def status_of(stopped: str) -> int:
    """The exit status of a run that no signal ended, by why it stopped."""
    return 1 if stopped == "non-finite loss" else 0


class Failed(Exception):
    """The work failed after it had begun."""


class Diverged(ArithmeticError):
    """A loss or a weight that isn't finite."""

    def __init__(self, what: str, step: int, lr: float):
        remedy = "lower --lr, or add --warmup-epochs or --clip-grad 1"
        super().__init__(f"{what} by step {step:,}, learning rate {lr:.3g}: {remedy}")


class Interrupted(BaseException):
    """A signal, by its number, that asks the process to end before there is anything to save."""


def one_line(text) -> str:
    """A message as one printable line: control characters are escaped, the middle of a very long one is left out."""
    text = printable(" ".join(str(text).split()))
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return text


def printable(text: str) -> str:
    """The text with control characters, except newlines, and lone surrogates escaped."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def show(line: str):
    """Print a line, as escaped ASCII if the terminal's encoding lacks a character."""
    line = printable(line)
    try:
        print(line, flush=True)
    except UnicodeError:
        print(line.encode("ascii", "backslashreplace").decode(), flush=True)


def complain(program, error):
    """Print one line on standard error, if there is one."""
    if sys.stderr is None:  # closed by the parent process
        return
    with contextlib.suppress(OSError, ValueError):  # a closed terminal
        print(one_line(f"{program}: error: {error}"), file=sys.stderr)


def exit_status(program, function, *, as_flags=str):
    """Call `function`, a command's main, and return the exit status: its own (None is 0), or what its exception means.

    `as_flags` turns a message that begins with an argument's name into one that begins with the flag.
    """

    def interrupt(number, frame):  # when there is nothing to save: else the handler is that of caught_signals
        raise Interrupted(number)

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where it can't write a cache of fonts
    try:
        with signal_handler(interrupt):
            return function() or 0
    except SystemExit as stop:  # argparse has printed why
        return stop.code
    except Interrupted as stop:
        return 128 + stop.args[0]
    except BrokenPipeError:  # ... | head
        return 0
    except (ValueError, OSError, Failed) as error:
        complain_once(program, as_flags(str(error)))
        return 1 if isinstance(error, Failed) else 2
    except Exception as error:
        if devices.is_out_of_memory(error):
            remedy = "lower --batch-size, or make the model or the images smaller"
            if program in ("predict.py", "bench.py"):  # which have no such flag
                remedy = "try --device cpu" if torch.cuda.is_initialized() else "end other programs, or try less"
            complain(program, f"out of memory: {remedy}")
            return 1
        if sys.flags.dev_mode:
            raise
        complain(program, unforeseen(error))
        return 2
    finally:
        flush_output()


def complain_once(program, said):
    """Print an error once per group: all processes most likely have the same one, so the others let process 0 print."""
    # "process ..." reports a lost process, which may be process 0: don't wait for it.
    if distributed.rank() > 0 and not said.startswith("process "):
        time.sleep(3)  # by now torchrun has ended this process, if process 0 has complained
        said = f"process {distributed.rank()}: {said}"
    complain(program, said)


def flush_output():
    """Flush both streams now: at exit Python would print a message of its own if that fails."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                setattr(sys, name, open(os.devnull, "w"))


def unforeseen(error: Exception) -> str:
    """The message for an unexpected exception, such as a bug in a user's model: error, place, how to see more."""
    lost = isinstance(error, RuntimeError) and re.search(checkpoints.LOST_PROCESS, str(error), re.IGNORECASE)
    if lost and distributed.world_size() > 1:  # most likely another process has ended
        silent = f"another one was silent for {distributed.TIME_LIMIT}"
        return f"process {distributed.rank()} stops: {silent if 'timed out' in str(error).lower() else error}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    return f"{type(error).__name__}: {error} ({where}; with python -X dev in place of python you see the traceback)"


@contextlib.contextmanager
def while_training(args):
    """Turn errors in this context into Failed, with a remedy if there is one: the run has begun."""
    try:
        yield
    except Failed:
        raise
    except (ValueError, OSError) as error:
        raise Failed(error) from None
    except Exception as error:
        if devices.is_out_of_memory(error):
            remedy = f"lower it, or raise --accum (now {args.accum}), or make the model smaller"
            if torch.cuda.is_initialized() and args.cuda_graph is not False:
                remedy += ", or use --no-cuda-graph"
            raise Failed(f"--batch-size {args.batch_size} runs out of memory: {remedy}") from None
        if args.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise Failed(f"--compile doesn't work here, use --no-compile: {str(error)[:300]}") from None
        if sys.flags.dev_mode:
            raise
        raise Failed(unforeseen(error)) from None


@contextlib.contextmanager
def drawing():
    """Raise Failed for matplotlib's RuntimeErrors (a missing LaTeX, say): no input is to blame."""
    try:
        yield
    except RuntimeError as error:
        raise Failed(f"matplotlib can't draw the plot: {error}") from None


def ending_signals():
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, kill, a lost connection; Windows lacks the last
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


@contextlib.contextmanager
def signal_handler(handler):
    """In this context `handler`, as signal.signal takes it, is called for each signal that asks the process to end."""
    old = {}
    try:
        for number in ending_signals():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored, as under nohup: leave it so
                old[number] = signal.signal(number, handler)
    except ValueError:  # not in the main thread: the caller handles signals
        pass
    try:
        yield
    finally:
        for number, rule in old.items():
            signal.signal(number, rule)


@contextlib.contextmanager
def caught_signals():
    """Yield a list that receives the number of a signal, so that training can save and end. A second one kills.

    Under torchrun it doesn't: that forwards a Ctrl-C which the terminal has already sent to every process.
    """
    caught = []

    def note(number, frame):
        caught.append(number)
        if distributed.world_size() == 1:
            for one in ending_signals():
                if signal.getsignal(one) is note:  # others are ignored, as under nohup
                    signal.signal(one, signal.SIG_DFL)

    with signal_handler(note):
        yield caught
