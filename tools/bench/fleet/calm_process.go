package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"syscall"
)

// The calm client is a process of its own: here its calls would wait for the
// turns of thousands of goroutines, and the server would be blamed for it.
//
// It says that it is ready, waits for a line on standard input, calls until
// standard input ends, and prints its result as JSON.
const (
	calmly = "calm"
	ready  = "ready\n"
)

// calmResult is what the calm client found: latencies by call, and of "all".
type calmResult struct {
	HealthBy string             `json:"health_by"`
	Calm     map[string]summary `json:"calm"`
}

// beCalm is the whole life of that process.
func beCalm(ctx context.Context, o options, input io.Reader, output io.Writer) error {
	c, err := newCalmClient(ctx, o)
	if err != nil {
		return err
	}
	defer c.close()
	if _, err := io.WriteString(output, ready); err != nil {
		return err
	}
	lines := bufio.NewReader(input)
	if _, err := lines.ReadString('\n'); err != nil {
		return errors.New("the load never began")
	}
	over := make(chan struct{})
	go func() {
		io.Copy(io.Discard, lines)
		close(over)
	}()
	c.run(ctx, over)
	return json.NewEncoder(output).Encode(c.result())
}

// calmProcess is the other side of it.
type calmProcess struct {
	command *exec.Cmd
	input   io.WriteCloser
	output  *bufio.Reader
}

// startCalm starts the calm client and waits until it has stored what it will ask for. Its own errors it prints itself.
func startCalm(ctx context.Context, o options) (*calmProcess, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	command := exec.CommandContext(ctx, program, "-how", calmly, "-addr", o.grpc, "-http", o.http,
		"-seed", strconv.Itoa(o.seed), "-deadline", o.deadline.String())
	command.Stderr = os.Stderr
	command.Cancel = func() error { return command.Process.Signal(syscall.SIGTERM) }
	input, err := command.StdinPipe()
	if err != nil {
		return nil, err
	}
	output, err := command.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := command.Start(); err != nil {
		return nil, err
	}
	p := &calmProcess{command, input, bufio.NewReader(output)}
	if line, err := p.output.ReadString('\n'); err != nil || line != ready {
		p.kill()
		return nil, errors.New("the calm client could not begin")
	}
	return p, nil
}

// begin starts its calls.
func (p *calmProcess) begin() error {
	_, err := p.input.Write([]byte("\n"))
	return err
}

// end lets it make its last call and returns its result.
func (p *calmProcess) end() (calmResult, error) {
	var r calmResult
	p.input.Close()
	if err := json.NewDecoder(p.output).Decode(&r); err != nil {
		return r, fmt.Errorf("reading what the calm client found: %w", err)
	}
	// That it was told to end early is no failure: it has said what it found.
	p.command.Wait()
	return r, nil
}

// kill ends it at once; harmless when it has ended.
func (p *calmProcess) kill() {
	p.command.Process.Kill()
	p.command.Wait()
}
