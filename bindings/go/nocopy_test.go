package express

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"unsafe"
)

// The pointers that the C ABI was given, as recorded by bindings/no_copy, are those of the slices.
func TestNothingIsCopied(t *testing.T) {
	path := os.Getenv("EXPRESS_POINTERS")
	if path == "" {
		t.Skip("run by test.sh, under the recorder of bindings/no_copy")
	}
	cache, s := newCache(t, testConfig()), newStream(2, 1)
	out, lse, half := make([]float32, 2*heads*dim), make([]float32, 2*heads), make([]uint16, 3*kvHeads*dim)
	q, k, v := s.rows(0, 2)
	must(t, os.RemoveAll(path))
	must(t, cache.Append(0, k, BF16(half[kvHeads*dim:], 2, kvHeads, dim).WithStrides(kvHeads*dim, dim, 1)))
	must(t, cache.Attend(0, q, F32(out, 2, heads, dim), F32(lse, 2, heads)))
	must(t, cache.Prefill(0, q, k, v, F32(out, 2, heads, dim), Tensor{}, Workspace{}))
	text, err := os.ReadFile(path)
	must(t, err)
	at := func(x []float32) unsafe.Pointer { return unsafe.Pointer(&x[0]) }
	want := fmt.Sprintf("express_append %x %x\n", at(s.k), &half[kvHeads*dim]) +
		fmt.Sprintf("express_attend %x %x %x\n", at(s.q), at(out), at(lse)) +
		fmt.Sprintf("express_prefill %x %x %x %x 0\n", at(s.q), at(s.k), at(s.v), at(out))
	same(t, "pointers", strings.ReplaceAll(want, "0x", ""), string(text))
}
