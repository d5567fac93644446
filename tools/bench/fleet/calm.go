package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	bspb "google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
)

const calmPause = 50 * time.Millisecond

// calmClient has one connection and makes one call after the other: how long
// those take is what a person at another machine notices of the load.
type calmClient struct {
	options
	connection *grpc.ClientConn
	web        *http.Client
	calls      []calmCall
	latencies  map[string]*latencies
	healthBy   string
}

type calmCall struct {
	name string
	make func(ctx context.Context) error
}

// newCalmClient stores what will be asked for, and finds out how the server says that it is well.
func newCalmClient(ctx context.Context, o options) (*calmClient, error) {
	connection, err := connect(o.grpc)
	if err != nil {
		return nil, err
	}
	c := &calmClient{options: o, connection: connection, web: &http.Client{}, latencies: map[string]*latencies{}}
	small := newBlob(fmt.Appendf(nil, "a small blob of seed %d", o.seed))
	action := newBlob(fmt.Appendf(nil, "an action of seed %d", o.seed))
	if err := c.store(ctx, small, action); err != nil {
		return nil, err
	}
	capabilities := repb.NewCapabilitiesClient(connection)
	results := repb.NewActionCacheClient(connection)
	streams := bspb.NewByteStreamClient(connection)
	c.calls = []calmCall{
		{"GetCapabilities", func(ctx context.Context) error {
			_, err := capabilities.GetCapabilities(ctx, &repb.GetCapabilitiesRequest{})
			return err
		}},
		{"GetActionResult", func(ctx context.Context) error {
			_, err := results.GetActionResult(ctx, &repb.GetActionResultRequest{ActionDigest: action.digest()})
			return err
		}},
		{"Read", func(ctx context.Context) error { return readBlob(ctx, streams, small) }},
	}
	if health, err := c.findHealth(ctx); err == nil {
		c.calls = append(c.calls, health)
	}
	for _, call := range c.calls {
		c.latencies[call.name] = &latencies{}
	}
	return c, nil
}

func (c *calmClient) close() { c.connection.Close() }

func (c *calmClient) store(ctx context.Context, small, action blob) error {
	ctx, end := context.WithTimeout(ctx, c.deadline)
	defer end()
	request := &repb.BatchUpdateBlobsRequest{Requests: []*repb.BatchUpdateBlobsRequest_Request{
		{Digest: small.digest(), Data: small.data},
	}}
	answer, err := repb.NewContentAddressableStorageClient(c.connection).BatchUpdateBlobs(ctx, request)
	if err == nil {
		err = checkBatch(answer, 1)
	}
	if err != nil {
		return fmt.Errorf("storing a small blob: %w", err)
	}
	_, err = repb.NewActionCacheClient(c.connection).UpdateActionResult(ctx, &repb.UpdateActionResultRequest{
		ActionDigest: action.digest(),
		ActionResult: &repb.ActionResult{
			OutputFiles: []*repb.OutputFile{{Path: "out", Digest: small.digest()}},
			StdoutRaw:   []byte("done\n"),
		},
	})
	if err != nil {
		return fmt.Errorf("storing an action result: %w", err)
	}
	return nil
}

// findHealth tries the ways in which servers say that they are well: casfs's and bazel-remote's pages, gRPC's service.
func (c *calmClient) findHealth(ctx context.Context) (calmCall, error) {
	var candidates []string
	if c.http != "" {
		candidates = []string{"/healthz", "/status"}
	}
	for _, path := range candidates {
		get := func(ctx context.Context) error {
			request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.http+path, nil)
			if err != nil {
				return err
			}
			return exchange(c.web, request)
		}
		if c.works(ctx, get) {
			c.healthBy = "GET " + path
			return calmCall{"health", get}, nil
		}
	}
	server := grpc_health_v1.NewHealthClient(c.connection)
	check := func(ctx context.Context) error {
		_, err := server.Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		return err
	}
	if c.works(ctx, check) {
		c.healthBy = "grpc.health.v1"
		return calmCall{"health", check}, nil
	}
	return calmCall{}, errors.New("the server has neither a page nor a service that says whether it is well")
}

func (c *calmClient) works(ctx context.Context, call func(context.Context) error) bool {
	ctx, end := context.WithTimeout(ctx, c.deadline)
	defer end()
	return call(ctx) == nil
}

// result is what was measured until now.
func (c *calmClient) result() calmResult {
	r := calmResult{HealthBy: c.healthBy, Calm: map[string]summary{}}
	all := &latencies{}
	for name, l := range c.latencies {
		r.Calm[name] = l.summarise()
		all.took = append(all.took, l.took...)
		all.failed += l.failed
	}
	r.Calm["all"] = all.summarise()
	return r
}

// run calls until `over` is closed. A call that is under way then is waited
// for, unless ctx ends: a server that leaves it unanswered mustn't look quick.
func (c *calmClient) run(ctx context.Context, over <-chan struct{}) {
	for n := 0; ; n++ {
		call := c.calls[n%len(c.calls)]
		began := time.Now()
		limited, end := context.WithTimeout(ctx, c.deadline)
		err := call.make(limited)
		end()
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			c.latencies[call.name].addFailure(c.deadline)
		} else {
			c.latencies[call.name].add(time.Since(began))
		}
		select {
		case <-over:
			return
		case <-ctx.Done():
			return
		case <-time.After(calmPause):
		}
	}
}
