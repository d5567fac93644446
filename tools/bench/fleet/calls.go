package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	bspb "google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// pieceBytes is how much of a blob Bazel puts into one WriteRequest.
const pieceBytes = 16 << 10

// upload is one blob on its way by ByteStream.Write. Its name stays the same
// from try to try, so that it goes on where the server says it stands.
type upload struct {
	client    *client
	blob      blob
	name      string
	committed int64
	// half says that the last piece is never sent: a build was interrupted.
	half bool
}

func (c *client) newUpload(b blob, half bool) *upload {
	return &upload{client: c, blob: b, name: b.writeName(), half: half}
}

// try writes what the server doesn't have yet. After a failure it asks how far
// the upload got: all of it is as good as an answer.
func (u *upload) try(ctx context.Context, connection int) error {
	err := u.write(ctx, connection)
	if err == nil || u.half || ctx.Err() != nil {
		return err
	}
	if u.query(ctx, connection) {
		return nil
	}
	return err
}

func (u *upload) write(ctx context.Context, connection int) error {
	ctx, end := context.WithTimeout(ctx, u.client.deadline)
	defer end()
	stream, err := u.client.stream(connection).Write(ctx)
	if err != nil {
		return err
	}
	if err := u.send(stream); err != nil && err != io.EOF {
		return err
	}
	if u.half {
		<-ctx.Done()
		return ctx.Err()
	}
	// After io.EOF the answer has the reason.
	answer, err := stream.CloseAndRecv()
	if err == nil && answer.CommittedSize != int64(len(u.blob.data)) {
		err = fmt.Errorf("the server committed %d of %d bytes", answer.CommittedSize, len(u.blob.data))
	}
	return err
}

func (u *upload) send(stream bspb.ByteStream_WriteClient) error {
	total := int64(len(u.blob.data))
	stop := total
	if u.half {
		stop = total / 2
	}
	for offset := u.committed; offset < stop; {
		next := min(offset+pieceBytes, stop)
		request := &bspb.WriteRequest{WriteOffset: offset, Data: u.blob.data[offset:next], FinishWrite: next == total}
		if offset == u.committed {
			request.ResourceName = u.name
		}
		if err := stream.Send(request); err != nil {
			return err
		}
		offset = next
	}
	return nil
}

// query asks how much of the upload the server has, and returns whether that is all.
func (u *upload) query(ctx context.Context, connection int) bool {
	u.client.tally.queries.Add(1)
	ctx, end := context.WithTimeout(ctx, u.client.deadline)
	defer end()
	request := &bspb.QueryWriteStatusRequest{ResourceName: u.name}
	answer, err := u.client.stream(connection).QueryWriteStatus(ctx, request)
	switch status.Code(err) {
	case codes.OK:
		size := int64(len(u.blob.data))
		if answer.Complete || answer.CommittedSize >= size {
			return true
		}
		u.committed = max(answer.CommittedSize, 0)
	case codes.NotFound, codes.Unimplemented:
		u.committed = 0
	}
	return false
}

func (c *client) batchAttempt(t task) attempt {
	request := &repb.BatchUpdateBlobsRequest{}
	for n := t.first; n < t.first+t.count; n++ {
		b := c.blob(c.number, n)
		request.Requests = append(request.Requests, &repb.BatchUpdateBlobsRequest_Request{Digest: b.digest(), Data: b.data})
	}
	return func(ctx context.Context, connection int) error {
		ctx, end := context.WithTimeout(ctx, c.deadline)
		defer end()
		answer, err := c.cas(connection).BatchUpdateBlobs(ctx, request)
		if err != nil {
			return err
		}
		return checkBatch(answer, len(request.Requests))
	}
}

// checkBatch returns the first failure of a blob in a batch.
func checkBatch(answer *repb.BatchUpdateBlobsResponse, wanted int) error {
	if len(answer.Responses) != wanted {
		return fmt.Errorf("the server answered for %d of %d blobs", len(answer.Responses), wanted)
	}
	for _, response := range answer.Responses {
		if response.Status.GetCode() != 0 {
			return status.FromProto(response.Status).Err()
		}
	}
	return nil
}

func (c *client) readAttempt(b blob) attempt {
	return func(ctx context.Context, connection int) error {
		ctx, end := context.WithTimeout(ctx, c.deadline)
		defer end()
		return readBlob(ctx, c.stream(connection), b)
	}
}

// readBlob reads a blob and compares its bytes.
func readBlob(ctx context.Context, server bspb.ByteStreamClient, b blob) error {
	stream, err := server.Read(ctx, &bspb.ReadRequest{ResourceName: b.readName()})
	if err != nil {
		return err
	}
	var got []byte
	for {
		answer, err := stream.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		got = append(got, answer.Data...)
	}
	if !bytes.Equal(got, b.data) {
		return errors.New("the server sent other bytes")
	}
	return nil
}

func (c *client) putAttempt(b blob) attempt {
	return func(ctx context.Context, _ int) error {
		ctx, end := context.WithTimeout(ctx, c.deadline)
		defer end()
		request, err := http.NewRequestWithContext(ctx, http.MethodPut, c.http+"/cas/"+b.hash, bytes.NewReader(b.data))
		if err != nil {
			return err
		}
		return exchange(c.web, request)
	}
}

// exchange makes an HTTP request; an answer other than 2xx is an error.
func exchange(web *http.Client, request *http.Request) error {
	answer, err := web.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	// Only a connection whose answer was read can be used again.
	if _, err := io.Copy(io.Discard, answer.Body); err != nil {
		return err
	}
	if answer.StatusCode/100 != 2 {
		return fmt.Errorf("HTTP status %d", answer.StatusCode)
	}
	return nil
}
