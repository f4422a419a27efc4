"What `benchmark` runs, one module an area. Every figure stands beside its bar; times are medians of runs in turns."
import time
from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


def side_by_side(
    runs:dict[str,Callable], # What is timed
    rounds:int=5, # Times each, in turns, after one that is not counted
)->dict[str, float]: # Median seconds of each
    "Time some functions in turns, so that a busy machine is busy for all of them."
    seconds = {k: [] for k in runs}
    for _ in range(rounds + 1):
        for k, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[k].append(time.perf_counter() - start)
    return {k: sorted(v[1:])[rounds//2] for k, v in seconds.items()}


def figure(
    what:str, figure:float, unit:str,
    bar:str="", held:bool|None=None, # What is asked of it, and whether it is held; nothing if nothing is asked
)->dict: # what, figure, unit, bar, held
    "Put a measured figure beside its bar."
    return dict(what=what, figure=figure, unit=unit, bar=bar, held=held)


class _Operations(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += 1
        return op(*args, **(kwargs or {}))


def operations(run:Callable, *args)->int:
    "Count the tensor operations of a call: what it does, whatever the machine."
    with _Operations() as o: run(*args)
    return o.count


def multiplications(run:Callable, *args)->int:
    "Count the multiplications in the matrix products of a call."
    with FlopCounterMode(display=False) as o: run(*args)
    return o.get_total_flops()//2
