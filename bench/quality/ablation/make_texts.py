#!/usr/bin/env python3
"""usage: make_texts.py LM_FOLDER LENGTH OUT.pt      development texts of LENGTH bytes: 14 plain ones, 12 with LENGTH / 1024 facts each"""
import os
import sys

import torch

import proto_texts as texts

lm, length, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dev, recall = os.path.join(lm, "dev.txt"), os.path.join(lm, "make_recall.py")
size = length // 1024
ready = {8: 4, 16: 4, 32: 2}.get(size, 0)
cases = [texts.read_case(os.path.join(lm, "recall", "dev-%dk-%d" % (size, i))) for i in range(ready)]
cases += texts.facts(dev, length, 12 - ready, size, recall)
torch.save({"plain": [list(x) for x in texts.plain(dev, length, 14)], "facts": [(list(t), a) for t, a in cases]}, out)
