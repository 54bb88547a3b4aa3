// Decoding far beyond the budget: a cache of 256 entries per KV head, on average, takes 4096 tokens, one by one, as a decoder would.
package main

import (
	"fmt"
	"log"
	"math"

	"express"
)

const layers, heads, kvHeads, dim, budget, tokens = 2, 4, 2, 64, 256, 4096

// fill stands in for a model: numbers in [-1, 1).
func fill(x []float32, state *uint32) {
	for i := range x {
		*state = *state*1664525 + 1013904223
		x[i] = float32(*state>>8)/8388608 - 1
	}
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// sumOfWeights of the entries of one KV head: always the number of tokens seen.
func sumOfWeights(cache *express.Cache, layer, head int) (entries int, sum float64) {
	entries, err := cache.Entries(layer, head)
	check(err)
	k, v, logWeight := make([]float32, entries*dim), make([]float32, entries*dim), make([]float32, entries)
	_, err = cache.Export(layer, head, express.F32(k, entries, dim), express.F32(v, entries, dim), express.F32(logWeight, entries),
		express.Tensor{})
	check(err)
	for _, w := range logWeight[:entries] {
		sum += math.Round(math.Exp(float64(w)))
	}
	return entries, sum
}

func main() {
	config := express.NewConfig(heads, kvHeads, dim)
	config.Layers, config.Budget = layers, budget
	cache, err := express.New(&config)
	check(err)
	defer cache.Close()

	q, k, v := make([]float32, heads*dim), make([]float32, kvHeads*dim), make([]float32, kvHeads*dim)
	out, state := make([]float32, heads*dim), uint32(1)
	for token := 0; token < tokens; token++ {
		for layer := 0; layer < layers; layer++ {
			fill(q, &state)
			fill(k, &state)
			fill(v, &state)
			check(cache.Append(layer, express.F32(k, 1, kvHeads, dim), express.F32(v, 1, kvHeads, dim)))
			check(cache.Attend(layer, express.F32(q, 1, heads, dim), express.F32(out, 1, heads, dim), express.Tensor{}))
		}
	}

	all := 0
	for layer := 0; layer < layers; layer++ {
		for head := 0; head < kvHeads; head++ {
			entries, sum := sumOfWeights(cache, layer, head)
			fmt.Printf("layer %d, KV head %d: %d tokens in %d entries, weights add up to %g\n", layer, head, tokens, entries, sum)
			if sum != tokens {
				log.Fatal("that is wrong")
			}
			all += entries
		}
	}
	if all > layers*kvHeads*budget {
		log.Fatal("that is wrong")
	}
	bytes, err := cache.Bytes()
	check(err)
	fmt.Println(bytes, "bytes")
}
