"""One case: its competitors are made and checked, and then timed or weighed."""

from .memory import MEASURES, attempt, peak_bytes
from .peer import OURS, LeftOut, ready
from .peers import PEERS
from .timing import interleave, quartiles, ratios
from .verdict import met, spread


def taking_part(case):
    """{name: factory} of those that take part in the case."""
    return {name: factory for name, factory in PEERS[case.suite].items() if case.peers is None or name in case.peers}


def gather(case, data, look, make_ready=ready):
    """({name: look(peer, error)} of those that are ready, {name: reason} of the others). Raises LeftOut if ours is not ready."""
    found, absent = {}, {}
    for name, factory in taking_part(case).items():
        try:
            found[name] = look(*make_ready(factory, data))
        except LeftOut as reason:
            if name == OURS:
                raise LeftOut(f"{case.suite} {case.name}: {OURS}: {reason}") from reason
            absent[name] = str(reason)
    return found, absent


def compare(case, seconds):
    """Times one case. Returns a dict ready for JSON. Raises LeftOut if our result is wrong."""
    data = case.data()
    found, absent = gather(case, data, lambda peer, error: (peer, error))
    times = interleave({name: peer.run for name, (peer, _) in found.items()}, seconds, least=case.rounds)
    result = timed(case, data, times, {name: error for name, (_, error) in found.items()}, absent)
    if case.memory:
        _add_memory(result["peers"], {name: peer for name, (peer, _) in found.items()}, case.memory)
    return result


def _add_memory(values, peers, targets):
    """Adds the peak memory of each competitor, where the system tells it, and the ratio of ours to it."""
    for name, peer in peers.items():
        peer.forget()
        peak = values[name]["peak_bytes"] = attempt(lambda peer: peak_bytes(peer.run), peer)
        peer.forget()
        if name != OURS:  # ours is the first one
            ours = values[OURS]["peak_bytes"]
            ratio = ours / peak if ours and peak else None
            most = targets.get(name)
            values[name]["memory"] = {
                "ratio": ratio,
                "target": most,
                "met": None if ratio is None or most is None else ratio <= most,
            }


def timed(case, data, times, errors, absent):
    ours, peers = times[OURS], {}
    for name, error in errors.items():
        peers[name] = {"us": quartiles(times[name]), "error": error}
        if name != OURS:
            ratio = ratios(ours, times[name])
            target = case.targets.get(name)
            peers[name] |= {"ratio": ratio, "spread": spread(ratio), "target": target, "met": met(ratio, target)}
    return {
        "suite": case.suite,
        "case": case.name,
        "rounds": len(ours),
        "tolerance": data.tolerance,
        "peers": peers,
        "absent": absent,
    }


def weigh(case):
    """Measures the memory of one case. Returns a dict ready for JSON."""
    data = case.data()
    measures = {name: MEASURES[name] for name in case.targets}
    peers, absent = gather(case, data, lambda peer, error: {name: attempt(measure, peer) for name, measure in measures.items()})
    ours = peers[OURS]
    reached = {name: None if ours[name] is None else ours[name] <= target for name, target in case.targets.items()}
    return {
        "suite": case.suite,
        "case": case.name,
        "peers": peers,
        "absent": absent,
        "targets": dict(case.targets),
        "met": reached,
    }
