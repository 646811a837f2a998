"""The threads that torch computes with on the CPU, of which OpenMP keeps a team for each thread that ever computed.

Between two operators GNU's OpenMP lets a team wait by turning round, which takes a microsecond to end. But where all
teams have more threads than there are cores, it lets them sleep at once, and each operator wakes its team anew: in a
decode step of hundreds of operators that takes as long as their work. So a thread that computes now and then, beside
one that does so all the time, lets go of its team.
"""

from __future__ import annotations

from .library import HAS_CPU


def let_go() -> None:
    """End the team of the calling thread. Its next operator that needs one starts it anew, in some 50 us."""
    if HAS_CPU:
        from .. import _C

        _C.release_threads()
