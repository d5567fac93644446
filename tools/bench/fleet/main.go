// fleet does to a build cache what many cold Bazel clients do to it at once,
// and says what a calm client notices meanwhile.
//
// Each of the clients has its own connections with many calls in flight on
// each. Every call has a deadline that runs from its beginning, and is tried
// again after a growing pause; a ByteStream.Write that failed is first asked
// for by QueryWriteStatus. Any server of the Remote Execution API or of
// Bazel's HTTP cache can be loaded.
//
// Standard error has a line "the load begins" when the clock starts, and one
// every five seconds; standard output has the result. SIGINT and SIGTERM end
// the load early, and what wasn't done by then has failed.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

func main() {
	o, err := parseOptions(os.Args[1:], os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if o.how == calmly {
		err = beCalm(ctx, o, os.Stdin, os.Stdout)
	} else {
		err = loadAndTell(ctx, o, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "fleet:", err)
		os.Exit(1)
	}
}

func loadAndTell(ctx context.Context, o options, output io.Writer) error {
	r, err := load(ctx, o)
	if err != nil {
		return err
	}
	if o.json {
		return r.writeJSON(output)
	}
	r.writeText(output)
	return nil
}

// load puts the whole load on the server.
func load(ctx context.Context, o options) (result, error) {
	calm, err := startCalm(ctx, o)
	if err != nil {
		return result{}, err
	}
	defer calm.kill()
	t := newTally()
	clients := make([]*client, o.clients)
	for n := range clients {
		if clients[n], err = newClient(o, n, t); err != nil {
			return result{}, err
		}
		defer clients[n].close()
		if err := clients[n].storeMissing(ctx); err != nil {
			return result{}, err
		}
	}
	fmt.Fprintln(os.Stderr, "the load begins")
	if err := calm.begin(); err != nil {
		return result{}, err
	}
	took := storm(ctx, o, clients, t)
	found, err := calm.end()
	if err != nil {
		return result{}, err
	}
	return newResult(o, t, found, took), nil
}

// storm runs all clients and returns how long they took.
func storm(ctx context.Context, o options, clients []*client, t *tally) time.Duration {
	began := time.Now()
	limited, end := context.WithTimeout(ctx, o.limit)
	defer end()
	go t.show(limited, began)
	var busy sync.WaitGroup
	for _, c := range clients {
		busy.Go(func() { c.run(limited) })
	}
	busy.Wait()
	return time.Since(began)
}
