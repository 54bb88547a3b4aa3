"""What the grids of configurations are written with: makers of policies, (model, sequences, length) -> policy."""
import json
import os

import proto_policies as policies

HERE = os.path.dirname(os.path.abspath(__file__))
PROFILE = os.path.join(HERE, "..", "..", "..", "examples", "byte_lm", "model", "profile.json")
far = json.load(open(PROFILE))["far_mass"]


def P(*a):
    """Exact."""
    return policies.Policy(*a)


def X(b, **k):
    return lambda *a: policies.Express(*a, b, **k)


def Wd(b, **k):
    return lambda *a: policies.Window(*a, b, **k)


def Sc(b, kind):
    return lambda *a: policies.Scored(*a, b, kind)


def O(D=1.0, p=3.0, **k):
    return dict(budgets="online", distance=D, power=p, **k)


N = dict(sink_far=False)
E = policies.Express
