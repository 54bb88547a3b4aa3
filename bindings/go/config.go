package express

/*
#include "calls.h"
*/
import "C"

import (
	"fmt"
	"math"
	"unsafe"
)

// Auto lets the library decide, in the fields that say so.
const Auto = C.EXPRESS_AUTO

// Schedule is how the coreset is thinned out: express_schedule.
type Schedule int32

// Halve one level when no slot is free, or in the paper's rounds of four.
const (
	ScheduleBudget Schedule = C.EXPRESS_SCHEDULE_BUDGET
	ScheduleRounds Schedule = C.EXPRESS_SCHEDULE_ROUNDS
)

// HeadBudgets is how the budgets of heads come about: express_head_budgets.
type HeadBudgets int32

// Following the attention that heads are seen to pay to far tokens where that is possible, for the life of the cache, or always following.
const (
	HeadBudgetsAuto     HeadBudgets = C.EXPRESS_HEAD_BUDGETS_AUTO
	HeadBudgetsFixed    HeadBudgets = C.EXPRESS_HEAD_BUDGETS_FIXED
	HeadBudgetsObserved HeadBudgets = C.EXPRESS_HEAD_BUDGETS_OBSERVED
)

// ProtectionScore is by which score entries are protected: express_protection_score.
type ProtectionScore int32

// By the budget; how far keys are from the mean, without their positions where RopeFrequencies are given; the same times the norm of the
// value.
const (
	ProtectionScoreAuto        ProtectionScore = C.EXPRESS_PROTECTION_SCORE_AUTO
	ProtectionScoreEnergy      ProtectionScore = C.EXPRESS_PROTECTION_SCORE_ENERGY
	ProtectionScoreEnergyValue ProtectionScore = C.EXPRESS_PROTECTION_SCORE_ENERGY_VALUE
)

// RopeLayout is which elements of a key are turned together: express_rope_layout.
type RopeLayout int32

// Element i and the one n behind it, of 2 n; or elements 2 i and 2 i + 1.
const (
	RopeLayoutHalves      RopeLayout = C.EXPRESS_ROPE_LAYOUT_HALVES
	RopeLayoutInterleaved RopeLayout = C.EXPRESS_ROPE_LAYOUT_INTERLEAVED
)

// Halving is how pairs are decided: express_halving.
type Halving int32

// Kernel halving, or a fair coin: uniform sampling, the baseline.
const (
	HalvingKernel Halving = C.EXPRESS_HALVING_KERNEL
	HalvingCoin   Halving = C.EXPRESS_HALVING_COIN
)

// BudgetUnit is what Config.Budget counts: express_budget_unit.
type BudgetUnit int32

// Entries per KV head, the mean over all layers and heads, or bytes of the whole cache.
const (
	BudgetEntries BudgetUnit = C.EXPRESS_BUDGET_ENTRIES
	BudgetBytes   BudgetUnit = C.EXPRESS_BUDGET_BYTES
)

// HeadSetting is the setting of one (layer, KV head), or of all KV heads of one layer. Auto is for all but Budget.
type HeadSetting struct {
	Budget, Sinks, Window, ProtectedEntries int
}

// Config is what a cache is made of: the fields of express_config, which says more about each. Start from NewConfig: zero means zero.
type Config struct {
	// The model. Scale: Auto is 1 / sqrt(KeyDim). DType: of what is kept.
	Layers, QueryHeads, KVHeads, KeyDim, ValueDim int
	Scale                                         float64
	DType                                         DType
	DeviceType                                    DeviceType
	DeviceID                                      int
	// The global index of layer 0 and KV head 0, in a model that is split over processes.
	FirstLayer, FirstKVHead int

	BudgetUnit BudgetUnit
	Budget     int
	// Kept exactly: the first tokens, the last ones (or Auto), and those whose keys stand out (or Auto).
	Sinks, Window, ProtectedEntries int
	// How many tokens Rollback can always take back.
	RollbackReserve int
	// Budgets that differ by head: one number, or one setting, per layer or per (layer, KV head).
	HeadShare    []float32
	HeadSettings []HeadSetting
	HeadBudgets  HeadBudgets
	// Which entries stand out; and the model's rotary positions, for that: by how many radians pairs of a key's elements are turned from
	// one token to the next, in all layers and heads alike. None: not known.
	ProtectionScore ProtectionScore
	RopeFrequencies []float32
	RopeLayout      RopeLayout

	// The method.
	Schedule                          Schedule
	Halving                           Halving
	WeightExponent, Gamma, Tau, Delta float64
	LevelFraction                     float64
	LevelFloor, MaxLevels             int // or Auto
	Seed                              uint64

	// Running. Threads: Auto is one per hardware thread.
	PrefillBlock           int
	AutoCompress, Validate bool
	Threads                int
	// A C function (express_parallel_for) that takes the place of the library's threads, and its argument; not memory of Go's.
	ParallelFor, ParallelForContext unsafe.Pointer
	// The cudaStream_t of calls on a GPU; 0 is the default stream.
	Stream uintptr
}

// NewConfig is for one layer of a model with so many query heads, KV heads and dimensions of a head, on the CPU, with the library's
// defaults for the rest: express_config_init.
func NewConfig(queryHeads, kvHeads, dim int) Config {
	var c C.express_config
	if err := failure(C.call_config_init(&c)); err != nil {
		panic(err) // refuses only a struct of another library's
	}
	return Config{
		Layers: int(c.layers), QueryHeads: queryHeads, KVHeads: kvHeads, KeyDim: dim, ValueDim: dim,
		Scale: float64(c.scale), DType: DType(c.dtype), DeviceType: DeviceType(c.device_type), DeviceID: int(c.device_id),
		FirstLayer: int(c.first_layer), FirstKVHead: int(c.first_kv_head),
		BudgetUnit: BudgetUnit(c.budget_unit), Budget: int(c.budget), Sinks: int(c.sinks), Window: int(c.window),
		ProtectedEntries: int(c.protected_entries), RollbackReserve: int(c.rollback_reserve),
		Schedule: Schedule(c.schedule), Halving: Halving(c.halving), WeightExponent: float64(c.weight_exponent),
		Gamma: float64(c.gamma), Tau: float64(c.tau), Delta: float64(c.delta), LevelFraction: float64(c.level_fraction),
		LevelFloor: int(c.level_floor), MaxLevels: int(c.max_levels), Seed: uint64(c.seed),
		PrefillBlock: int(c.prefill_block), AutoCompress: c.auto_compress != 0, Validate: c.validate != 0, Threads: int(c.threads),
		HeadBudgets: HeadBudgets(c.head_budgets), ProtectionScore: ProtectionScore(c.protection_score),
		RopeLayout: RopeLayout(c.rope_layout),
	}
}

// arrays are what a config for C refers to. They go beside it.
type arrays struct {
	shares, frequencies *C.float
	settings            *C.express_head_setting
}

// raw is the config for C.
func (c *Config) raw() (raw C.express_config, at arrays, err error) {
	small := func(name string, value int) C.int32_t {
		if (value < math.MinInt32 || value > math.MaxInt32) && err == nil {
			err = &Error{StatusInvalidArgument, fmt.Sprintf("config.%s: %d does not fit 32 bits", name, value)}
		}
		return C.int32_t(value)
	}
	flag := func(value bool) C.int32_t {
		if value {
			return 1
		}
		return 0
	}
	raw = C.express_config{
		struct_size: C.sizeof_express_config,
		layers:      small("layers", c.Layers), query_heads: small("query_heads", c.QueryHeads),
		kv_heads: small("kv_heads", c.KVHeads), key_dim: small("key_dim", c.KeyDim), value_dim: small("value_dim", c.ValueDim),
		scale: C.double(c.Scale), dtype: C.int32_t(c.DType), device_type: C.int32_t(c.DeviceType),
		device_id: small("device_id", c.DeviceID), first_layer: small("first_layer", c.FirstLayer),
		first_kv_head: small("first_kv_head", c.FirstKVHead), budget_unit: C.int32_t(c.BudgetUnit), budget: C.int64_t(c.Budget),
		sinks: C.int64_t(c.Sinks), window: C.int64_t(c.Window), protected_entries: C.int64_t(c.ProtectedEntries),
		rollback_reserve: C.int64_t(c.RollbackReserve), head_share_count: C.int64_t(len(c.HeadShare)),
		head_settings_count: C.int64_t(len(c.HeadSettings)), schedule: C.int32_t(c.Schedule), halving: C.int32_t(c.Halving),
		weight_exponent: C.double(c.WeightExponent), gamma: C.double(c.Gamma), tau: C.double(c.Tau), delta: C.double(c.Delta),
		level_fraction: C.double(c.LevelFraction), level_floor: C.int64_t(c.LevelFloor), max_levels: C.int64_t(c.MaxLevels),
		seed: C.uint64_t(c.Seed), prefill_block: small("prefill_block", c.PrefillBlock), auto_compress: flag(c.AutoCompress),
		validate: flag(c.Validate), threads: small("threads", c.Threads), parallel_for: (C.express_parallel_for)(c.ParallelFor),
		parallel_for_context: c.ParallelForContext, head_budgets: C.int32_t(c.HeadBudgets),
		protection_score: C.int32_t(c.ProtectionScore), rope_layout: C.int32_t(c.RopeLayout),
		rope_frequency_count: C.int64_t(len(c.RopeFrequencies)),
	}
	*(*uintptr)(unsafe.Pointer(&raw.stream)) = c.Stream // a handle, not memory
	if len(c.HeadShare) > 0 {
		at.shares = (*C.float)(&c.HeadShare[0])
	}
	if len(c.RopeFrequencies) > 0 {
		at.frequencies = (*C.float)(&c.RopeFrequencies[0])
	}
	if len(c.HeadSettings) > 0 {
		rows := make([]C.express_head_setting, len(c.HeadSettings))
		for i, s := range c.HeadSettings {
			rows[i] = C.express_head_setting{budget: C.int64_t(s.Budget), sinks: C.int64_t(s.Sinks), window: C.int64_t(s.Window),
				protected_entries: C.int64_t(s.ProtectedEntries)}
		}
		at.settings = &rows[0]
	}
	return raw, at, err
}
