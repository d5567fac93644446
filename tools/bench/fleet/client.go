package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	bspb "google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// latestCancel is the longest time after which a cancelled call is cancelled.
const latestCancel = 100 * time.Millisecond

// client does what one cold Bazel does: it begins all its calls, as many at a
// time as its connections have room for, and tries each again that fails.
type client struct {
	options
	number      int
	tally       *tally
	connections []*grpc.ClientConn
	web         *http.Client
	// slots holds the number of a connection for each call that it still has room for.
	slots chan int
	// webSlots is the same for HTTP, where a connection has room for one call.
	webSlots chan int
}

func newClient(o options, number int, t *tally) (*client, error) {
	c := &client{
		options:  o,
		number:   number,
		tally:    t,
		slots:    make(chan int, o.conns*o.streams),
		webSlots: make(chan int, o.conns),
		web: &http.Client{Transport: &http.Transport{
			MaxConnsPerHost:     o.conns,
			MaxIdleConnsPerHost: o.conns,
		}},
	}
	for n := 0; n < o.conns; n++ {
		connection, err := connect(o.grpc)
		if err != nil {
			return nil, err
		}
		c.connections = append(c.connections, connection)
		c.webSlots <- n
	}
	// All connections get their first call before any gets its second one.
	for range o.streams {
		for n := range o.conns {
			c.slots <- n
		}
	}
	return c, nil
}

func connect(address string) (*grpc.ClientConn, error) {
	return grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

func (c *client) close() {
	for _, connection := range c.connections {
		connection.Close()
	}
	c.web.CloseIdleConnections()
}

// run makes all calls of the client and returns when each has succeeded, failed or been cancelled.
func (c *client) run(ctx context.Context) {
	var calls sync.WaitGroup
	for _, t := range c.plan(c.number) {
		slot, ok := take(ctx, c.room(t))
		if !ok {
			c.tally.failed.Add(int64(t.count))
			continue
		}
		calls.Go(func() { c.carryOut(ctx, t, slot) })
	}
	calls.Wait()
}

func (c *client) room(t task) chan int {
	if t.way == viaHTTP {
		return c.webSlots
	}
	return c.slots
}

// carryOut tries a call until it succeeds. Between two tries its place on the connection is free for others.
func (c *client) carryOut(ctx context.Context, t task, slot int) {
	try, pause := c.prepare(t), newBackoff()
	for tries := 0; ; tries++ {
		c.tally.tries.Add(1)
		err := c.tryOnce(ctx, t, slot, try)
		c.room(t) <- slot
		if err == nil {
			c.tally.done.Add(int64(t.count))
			return
		}
		if t.cancelled {
			c.tally.cancelled.Add(int64(t.count))
			return
		}
		c.tally.note(err)
		ok := tries < c.retries && pause.wait(ctx)
		if ok {
			slot, ok = take(ctx, c.room(t))
		}
		if !ok {
			c.tally.failed.Add(int64(t.count))
			return
		}
	}
}

// attempt makes a call once, on the connection of that number.
type attempt func(ctx context.Context, connection int) error

func (c *client) prepare(t task) attempt {
	switch t.way {
	case viaWrite:
		return c.newUpload(c.blob(c.number, t.first), t.cancelled).try
	case viaBatch:
		return c.batchAttempt(t)
	case viaHTTP:
		return c.putAttempt(c.blob(c.number, t.first))
	case viaRead:
		return c.readAttempt(c.blob(c.number, t.first))
	}
	panic(fmt.Sprintf("there is no way %d", t.way))
}

func (c *client) tryOnce(ctx context.Context, t task, slot int, try attempt) error {
	if t.cancelled {
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		defer time.AfterFunc(rand.N(latestCancel), cancel).Stop()
	}
	return try(ctx, slot)
}

func (c *client) stream(connection int) bspb.ByteStreamClient {
	return bspb.NewByteStreamClient(c.connections[connection])
}

func (c *client) cas(connection int) repb.ContentAddressableStorageClient {
	return repb.NewContentAddressableStorageClient(c.connections[connection])
}

// take waits for a free slot; false if the time is up.
func take(ctx context.Context, slots chan int) (int, bool) {
	select {
	case slot := <-slots:
		return slot, true
	case <-ctx.Done():
		return 0, false
	}
}
