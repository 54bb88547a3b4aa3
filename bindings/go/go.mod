module express

go 1.19
