module overhead

go 1.19

require express v0.0.0

replace express => ../../../bindings/go
