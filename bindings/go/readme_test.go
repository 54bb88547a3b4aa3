package express

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// The README's program, in a module of its own, as a reader would have it.
func TestTheReadmeRuns(t *testing.T) {
	text, err := os.ReadFile("README.md")
	must(t, err)
	code := regexp.MustCompile("(?s)```go\n(.*?)```").FindSubmatch(text)
	if code == nil {
		t.Fatal("README.md has no program")
	}
	here, err := os.Getwd()
	must(t, err)
	module := t.TempDir()
	must(t, os.WriteFile(filepath.Join(module, "main.go"), code[1], 0o666))
	for _, command := range [][]string{
		{"mod", "init", "reader"},
		{"mod", "edit", "-require", "express@v0.0.0", "-replace", "express=" + here},
		{"vet", "."},
		{"run", "."},
	} {
		run := exec.Command("go", command...)
		run.Dir = module
		output, err := run.CombinedOutput()
		if err != nil {
			t.Fatalf("go %v: %v\n%s", command, err, output)
		}
		if command[0] == "run" && !regexp.MustCompile(`^\d+ entries for 2000 tokens in \d+ bytes\n$`).Match(output) {
			t.Errorf("it prints %s", output)
		}
	}
	formatted, err := exec.Command("gofmt", "-l", filepath.Join(module, "main.go")).Output()
	if same(t, "not formatted", "", fmt.Sprintf("%s", formatted)); err != nil {
		t.Error(err)
	}
}
