#!/usr/bin/env python3
"""Tests of express-lm on nothing but the repository's own model and text.   usage: test_express_lm.py EXPRESS_LM MODEL_DIR"""
import json
import os
import subprocess
import sys
import tempfile
import unittest

PROGRAM, MODEL = sys.argv[1:3]
TEXT = os.path.join(MODEL, "demo.txt")
PROFILE = os.path.join(MODEL, "profile.json")


def run(*args, fails=False):
    done = subprocess.run([PROGRAM] + [str(a) for a in args], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = done.stdout.decode("utf-8", "replace"), done.stderr.decode()
    if fails:
        assert done.returncode != 0, "should have failed: %s" % (args,)
        return err
    assert done.returncode == 0, "%s: %s" % (args, err)
    return out


def score(*args):
    return json.loads(run("score", "--model", MODEL, "--text", TEXT, "--json", *args))


def case(name):
    return os.path.join(MODEL, "recall", name + ".json")


class ExpressLm(unittest.TestCase):
    def test_logits_match_the_reference(self):
        self.assertIn("largest logit difference", run("check", "--model", MODEL))

    def test_json_has_the_documented_keys(self):
        r = score("--tokens", 600, "--policy", "express", "--budget", 128, "--seed", 3)
        for key in ("policy", "budget", "tokens", "bits_per_byte", "bits_per_byte_second_half", "by_position", "kv_bytes_peak",
                    "entries_peak", "prefill_seconds", "decode_seconds", "seed"):
            self.assertIn(key, r)
        self.assertEqual((r["policy"], r["budget"], r["tokens"], r["seed"]), ("express", 128, 600, 3))
        self.assertLessEqual(r["entries_peak"], 128 * 16)
        self.assertGreater(r["prefill_seconds"], 0)
        self.assertEqual(r["decode_seconds"], 0)

    def test_every_policy_is_exact_while_everything_fits(self):
        exact = score("--tokens", 1000, "--policy", "exact")["bits_per_byte"]
        for policy in ("window", "uniform", "express"):
            self.assertAlmostEqual(score("--tokens", 1000, "--policy", policy, "--budget", 1100)["bits_per_byte"], exact, delta=1e-4)

    def test_blocks_and_decoding_agree_on_an_exact_cache(self):
        blocks = score("--tokens", 700, "--policy", "exact")
        decode = score("--tokens", 700, "--policy", "exact", "--block", 1)
        self.assertAlmostEqual(blocks["bits_per_byte"], decode["bits_per_byte"], delta=1e-4)
        self.assertGreater(decode["decode_seconds"], 0)

    def test_storage_types_cost_little_and_halve_the_entries(self):
        f32 = score("--tokens", 2000, "--policy", "express", "--budget", 512)
        for dtype in ("f16", "bf16"):
            r = score("--tokens", 2000, "--policy", "express", "--budget", 512, "--dtype", dtype)
            self.assertAlmostEqual(r["bits_per_byte"], f32["bits_per_byte"], delta=0.02)
            self.assertLess(r["kv_bytes_peak"], 0.75 * f32["kv_bytes_peak"])
        i8 = score("--tokens", 2000, "--policy", "express", "--budget", 512, "--dtype", "i8")
        self.assertAlmostEqual(i8["bits_per_byte"], f32["bits_per_byte"], delta=0.02)
        self.assertEqual(i8["entries_peak"], f32["entries_peak"])
        self.assertLess(i8["kv_bytes_peak"], 0.75 * r["kv_bytes_peak"])
        more = score("--tokens", 2000, "--policy", "express", "--budget", r["kv_bytes_peak"], "--budget-unit", "bytes", "--dtype", "i8")
        self.assertLessEqual(more["kv_bytes_peak"], r["kv_bytes_peak"])
        self.assertGreater(more["entries_peak"], 1.3 * r["entries_peak"])

    def test_schedules_halvings_and_seeds_are_options_that_do_something(self):
        args = ("--tokens", 3000, "--policy", "express", "--budget", 256, "--window", 64, "--protected", 0)
        bits = [score(*args)["bits_per_byte"]]
        for more in (("--schedule", "rounds"), ("--halving", "coin"), ("--seed", 1), ("--alpha", 1), ("--gamma", 0), ("--tau", 1)):
            bits.append(score(*args, *more)["bits_per_byte"])
        self.assertEqual(len(set(bits)), len(bits), bits)
        self.assertEqual(score(*args)["bits_per_byte"], bits[0])  # and the same run gives the same result

    def test_protected_entries_are_chosen_without_positions(self):
        args = ("--tokens", 3000, "--policy", "express", "--budget", 256)
        bits = [score(*args, *more)["bits_per_byte"] for more in ((), ("--score", "energy-value"), ("--no-rotary",))]
        self.assertEqual(len(set(bits)), 3, bits)
        self.assertEqual(score(*args, "--score", "energy")["bits_per_byte"], bits[0])

    def test_facts_are_recalled_exactly_and_under_a_budget(self):
        exact = json.loads(run("recall", "--model", MODEL, "--json", "--policy", "exact", "--case", case("demo-8k-0")))
        self.assertEqual((exact["recalled"], exact["asked"]), (8, 8))
        both = json.loads(run("recall", "--model", MODEL, "--json", "--policy", "express", "--budget", 1024, "--profile", PROFILE,
                              "--case", case("demo-8k-0"), case("demo-8k-1")))
        self.assertEqual(both["asked"], 16)
        self.assertGreaterEqual(both["recalled"], 13)
        window = json.loads(run("recall", "--model", MODEL, "--json", "--policy", "window", "--budget", 1024, "--case", case("demo-8k-0")))
        self.assertLess(window["recalled"], 4)

    def test_profile_is_measured_and_taken(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "profile.json")
            run("profile", "--model", MODEL, "--text", TEXT, "--tokens", 1500, "--beyond", 256, "--budget", 200, "--output", path)
            with open(path) as file:
                profile = json.load(file)
            self.assertEqual(len(profile["far_mass"]), 8)
            masses = [m for layer in profile["far_mass"] for m in layer]
            self.assertTrue(all(0 <= m <= 1 for m in masses) and max(masses) > 2 * min(masses))
            budgets = [b for layer in profile["budgets"] for b in layer]
            self.assertTrue(all(b >= 62 for b in budgets) and 200 * 16 - 16 <= sum(budgets) <= 200 * 16)
            r = score("--tokens", 1500, "--policy", "express", "--budget", 200, "--profile", path)
            self.assertLessEqual(r["entries_peak"], 200 * 16)

    def test_generate_streams_text_and_repeats_itself_for_a_seed(self):
        args = ("generate", "--model", MODEL, "--prompt-file", TEXT, "--prompt-tokens", 900, "--tokens", 60, "--policy", "express",
                "--budget", 256, "--temperature", 0.7, "--seed", 5)
        text = run(*args)
        self.assertGreater(len(text.strip()), 20)
        self.assertEqual(run(*args), text)
        r = json.loads(run(*args, "--json"))
        self.assertGreater(r["decode_tokens_per_second"], 0)

    def test_errors_name_what_is_wrong(self):
        for args, names in (
                (("score", "--model", MODEL, "--text", TEXT, "--policy", "nonsense"), "policy"),
                (("score", "--model", MODEL, "--text", "/nonexistent"), "/nonexistent"),
                (("score", "--model", "/nonexistent", "--text", TEXT), "config.json"),
                (("score", "--model", MODEL, "--text", TEXT, "--budget", 5), "budget"),
                (("score", "--model", MODEL, "--text", TEXT, "--alpha", 2), "weight_exponent"),
                (("score", "--model", MODEL, "--text", TEXT, "--profile", TEXT), "parse"),
                (("score", "--model", MODEL, "--text", TEXT, "--offset", 10**9), "offset"),
                (("score", "--model", MODEL, "--text", TEXT, "--unit", 99), "unit"),
                (("score", "--model", MODEL, "--text", TEXT, "--policy", "window", "--dtype", "f16"), "dtype"),
                (("score", "--model", MODEL, "--text", TEXT, "--policy", "window", "--budget-unit", "bytes"), "budget-unit"),
                (("score", "--model", MODEL), "text"),
                (("frobnicate",), "")):
            self.assertIn(names, run(*args, fails=True))


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
