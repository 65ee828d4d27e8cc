"""Seconds of an iteration by discrete events: what the ranks do, one event after another.

Every rank has its program, the nodes that need it in the graph's order, and is at one of them. A node begins when all
its ranks have come to it and all it waits for has ended. An independent check of `table.py`: it shares the plan
and the costs with it, and nothing else.
"""

import heapq
from collections import deque
from collections.abc import Sequence

from training.planner.reallocation_cost import Node

Job = tuple[int, int]
"""Iteration, place in the graph."""


class EventLoop:
    """Runs the nodes of some iterations; `run` returns when the last has ended."""

    def __init__(self, nodes: Sequence[Node], iterations: int):
        self.nodes = nodes
        place = {node.name: index for index, node in enumerate(nodes)}
        self.programs: dict[int, deque[Job]] = {}
        self.arriving: dict[Job, int] = {}
        """Ranks and earlier nodes that a job still waits for."""
        self.followers: dict[Job, list[Job]] = {}
        for iteration in range(iterations):
            for index, node in enumerate(nodes):
                job = (iteration, index)
                earlier = [(iteration - a.iterations_back, place[a.name]) for a in node.after]
                earlier = [one for one in earlier if one[0] >= 0]
                self.arriving[job] = len(node.ranks) + len(earlier)
                for one in earlier:
                    self.followers.setdefault(one, []).append(job)
                for rank in node.ranks:
                    self.programs.setdefault(rank, deque()).append(job)
        self.running: list[tuple[float, Job]] = []
        self.now = 0.0

    def run(self) -> float:
        """The time at which the last node ends."""
        for job in [job for job, waits in self.arriving.items() if waits == 0]:
            self.begin(job)
        for program in self.programs.values():
            self.arrive(program[0])
        while self.running:
            self.now, job = heapq.heappop(self.running)
            self.end(job)
        return self.now

    def arrive(self, job: Job) -> None:
        self.arriving[job] -= 1
        if self.arriving[job] == 0:
            self.begin(job)

    def begin(self, job: Job) -> None:
        heapq.heappush(self.running, (self.now + self.nodes[job[1]].seconds, job))

    def end(self, job: Job) -> None:
        for rank in self.nodes[job[1]].ranks:
            program = self.programs[rank]
            program.popleft()
            if program:
                self.arrive(program[0])
        for follower in self.followers.get(job, []):
            self.arrive(follower)


def makespan_by_events(nodes: Sequence[Node], iterations: int) -> float:
    """Seconds until all nodes of all iterations have ended."""
    return EventLoop(nodes, iterations).run()
