package main

import (
	"flag"
	"fmt"
	"io"
	"time"
)

// smallestBlob has room for the numbers that make a blob different from all others.
const smallestBlob = 64

// options is the command line.
type options struct {
	grpc     string
	http     string
	how      string
	clients  int
	conns    int
	streams  int
	files    int
	size     int
	seed     int
	cancel   float64
	retries  int
	deadline time.Duration
	limit    time.Duration
	json     bool
}

// parseOptions reads the command line. Its error has already been printed, with the usage.
func parseOptions(arguments []string, output io.Writer) (options, error) {
	var o options
	flags := flag.NewFlagSet("fleet", flag.ContinueOnError)
	flags.SetOutput(output)
	flags.StringVar(&o.grpc, "addr", "127.0.0.1:8980", "gRPC address of the server")
	flags.StringVar(&o.http, "http", "", "base URL of the server's HTTP cache, such as http://127.0.0.1:8080")
	flags.StringVar(&o.how, "how", "write", "write (ByteStream), batch (BatchUpdateBlobs), http (PUT), read (ByteStream), mixed; or calm: one client that calls until standard input ends")
	flags.IntVar(&o.clients, "clients", 4, "clients")
	flags.IntVar(&o.conns, "conns", 100, "connections of each client")
	flags.IntVar(&o.streams, "streams", 100, "calls in flight on each gRPC connection")
	flags.IntVar(&o.files, "files", 20_000, "blobs of each client")
	flags.IntVar(&o.size, "size", 500, "bytes of each blob")
	flags.IntVar(&o.seed, "seed", 1, "another seed makes other blobs")
	flags.Float64Var(&o.cancel, "cancel", 0, "fraction of the calls that are cancelled midway and not tried again")
	flags.IntVar(&o.retries, "retries", 5, "tries after the first one")
	flags.DurationVar(&o.deadline, "deadline", 60*time.Second, "of each call, from its beginning")
	flags.DurationVar(&o.limit, "limit", 300*time.Second, "of the whole load: what isn't done by then has failed")
	flags.BoolVar(&o.json, "json", false, "print the result as one JSON object")
	if err := flags.Parse(arguments); err != nil {
		return o, err
	}
	if err := o.check(flags.NArg()); err != nil {
		fmt.Fprintln(output, "fleet:", err)
		return o, err
	}
	return o, nil
}

func (o options) check(leftover int) error {
	if leftover > 0 {
		return fmt.Errorf("there are no arguments besides options, got %d", leftover)
	}
	if _, known := ways[o.how]; !known {
		return fmt.Errorf("unknown -how %q: choose write, batch, http, read, mixed or calm", o.how)
	}
	if o.http == "" && o.uses(viaHTTP) {
		return fmt.Errorf("-how %s needs the HTTP address of the server: -http URL", o.how)
	}
	if o.clients < 1 || o.conns < 1 || o.streams < 1 || o.files < 1 {
		return fmt.Errorf("-clients, -conns, -streams and -files must be at least 1")
	}
	if o.size < smallestBlob {
		return fmt.Errorf("-size must be at least %d, got %d", smallestBlob, o.size)
	}
	if o.cancel < 0 || o.cancel > 1 {
		return fmt.Errorf("-cancel must be between 0 and 1, got %g", o.cancel)
	}
	return nil
}

// uses tells whether some of the calls are of that kind.
func (o options) uses(wanted way) bool {
	for _, w := range ways[o.how] {
		if w == wanted {
			return true
		}
	}
	return false
}
