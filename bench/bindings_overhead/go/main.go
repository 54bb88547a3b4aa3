// overhead.c in Go.
package main

import (
	"fmt"
	"log"
	"os"
	"strconv"
	"time"

	"express"
)

const dim = 16

func numbers(a, b int) []float32 {
	x := make([]float32, dim)
	for i := range x {
		x[i] = float32(i*a%b) / float32(b)
	}
	return x
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func main() {
	calls, err := strconv.Atoi(os.Args[1])
	check(err)
	q, k, v, out := numbers(5, 7), numbers(3, 5), numbers(7, 11), make([]float32, dim)
	config := express.NewConfig(1, 1, dim)
	config.Budget, config.Threads = 16, 1
	cache, err := express.New(&config)
	check(err)
	start := time.Now()
	for i := 0; i < calls; i++ {
		check(cache.Append(0, express.F32(k, 1, 1, dim), express.F32(v, 1, 1, dim)))
		check(cache.Attend(0, express.F32(q, 1, 1, dim), express.F32(out, 1, 1, dim), express.Tensor{}))
	}
	step := time.Since(start)
	start = time.Now()
	for i := 0; i < calls; i++ {
		_, err := cache.Bytes()
		check(err)
	}
	look := time.Since(start)
	sum := 0.0
	for _, x := range out {
		sum += float64(x)
	}
	stats, err := cache.Stats(0)
	check(err)
	each := func(t time.Duration) float64 { return float64(t.Nanoseconds()) / float64(calls) }
	fmt.Printf("%.1f %.1f %.4f %d\n", each(step), each(look), sum, stats.Halvings)
}
